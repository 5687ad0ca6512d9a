"""Which libraries and Triton kernels ran: recorded where they are called, not where chosen.

A test that says "cudnn" may pass on another library's answers; one that asks :class:`Ran` can't.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import triton

from skiparse.backends import sdpa


class Ran:
    """The names of what ran since it was last asked."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def only(self, *names: str) -> None:
        """Raise AssertionError unless these ran, all of them and no others."""
        ran, self.names = self.names, set()
        assert ran == set(names), f"ran: {sorted(ran)}, not {sorted(names)}"


@contextmanager
def recorded() -> Iterator[Ran]:
    """What runs inside: ``"<library> forward"`` and ``"<library> backward"``, and Triton's kernels.

    A library counts once its function has returned, a kernel when it is launched on a device.
    """
    ran = Ran()

    def recording(library: sdpa.Library) -> sdpa.Library:
        def forward(*args):
            made = library.forward(*args)
            ran.names.add(f"{library.name} forward")
            return made

        def backward(*args):
            made = library.backward(*args)
            ran.names.add(f"{library.name} backward")
            return made

        return library._replace(forward=forward, backward=backward)

    def launched(metadata) -> None:
        ran.names.add(metadata.get()["name"])

    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(launched)
    try:
        with mock.patch.object(sdpa, "LIBRARIES", tuple(map(recording, sdpa.LIBRARIES))):
            yield ran
    finally:
        hook.remove(launched)
