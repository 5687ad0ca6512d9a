"""Faults planted in the PTX of kernels, each an edit in one place, and each to be caught.

Written by opcode, not by register or line, so that they hold for several releases of Triton.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Planted:
    """``find`` is replaced by ``put`` at its ``nth`` place, or at the last before ``before``."""

    kernel: str
    what: str
    find: str
    put: str
    nth: int = 0
    before: str | None = None  # the last place of this pattern

    def edit(self, kernel, ptx):
        """The PTX with the fault, if it is of this kernel."""
        if kernel != self.kernel:
            return ptx
        places = list(re.finditer(self.find, ptx))
        if self.before is not None:
            end = list(re.finditer(self.before, ptx))[-1].start()
            place = [x for x in places if x.start() < end][-1]
        else:
            place = places[self.nth]
        changed = ptx[: place.start()] + place.expand(self.put) + ptx[place.end() :]
        assert changed != ptx, f"{self.what}: nothing has changed"
        return changed


FORWARD, TMA = "skiparse_forward", "skiparse_forward_tma"
DKDV, DQ = "skiparse_dkdv", "skiparse_dq"
PINGPONG, PACK = "skiparse_forward_pingpong", "skiparse_pack"

WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, [^;]*;"
NO_WAIT = "setp.eq.b32 complete, 0, 0;"
FREE = r"mbarrier\.arrive\.shared::cta\.b64 _, [^;]*;"
NOTHING = "bar.warp.sync -1;"
COPIES = r"cp\.async\.wait_group\s+0;"

ON_HOPPER = (
    Planted(TMA, "keys are not waited for", WAIT, NO_WAIT),
    Planted(TMA, "too few bytes are expected", r"(expect_tx[^;]*), \d+;", r"\1, 128;"),
    Planted(DKDV, "queries are not waited for", COPIES, "cp.async.wait_group 8;"),
    Planted(DQ, "scores are used before they are there",
            r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
    Planted(PINGPONG, "scores are used before they are there",
            r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
    Planted(PINGPONG, "the first keys are never freed", FREE, NOTHING, nth=1),
    Planted(PINGPONG, "values are copied into a slot in use", WAIT, NO_WAIT, before="expect_tx"),
    Planted(PACK, "a store goes 16 bytes too far",
            r"(st\.global\.v4\.b32 \[ %rd\d+ \+) 0 \]", r"\1 16 ]"),
)  # fmt: skip
