"""What the host twin raises where a kernel does what the hardware forbids."""


class TwinFault(AssertionError):
    """Its text begins with the sub-core and the line of the kernel, then names the broken rule.

    ``lane`` is the sub-core (``"cube"``, ``"vector 0"``, ``"vector 1"``), ``file`` and ``line`` the
    place in the kernel, ``rule`` the rest of the text. What is seen only once the kernel has ended
    has no lane, or no place: ``""`` and 0.
    """

    def __init__(self, text: str, lane: str, file: str, line: int, rule: str) -> None:
        super().__init__(text)
        self.lane, self.file, self.line, self.rule = lane, file, line, rule
