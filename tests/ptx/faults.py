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
DKDV_TMA, DQ_TMA = "skiparse_dkdv_tma", "skiparse_dq_tma"
PINGPONG, PACK = "skiparse_forward_pingpong", "skiparse_pack"

WAIT = r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64 complete, [^;]*;"
NO_WAIT = "setp.eq.b32 complete, 0, 0;"
BYTES = r"(mbarrier\.arrive\.expect_tx[^;]*), \d+;"
FREE = r"mbarrier\.arrive\.shared(?:::cta)?\.b64 _, [^;]*;"
NOTHING = "bar.warp.sync -1;"
COPIES = r"cp\.async\.wait_group\s+\d+;"
BARRIER = r"bar\.sync\s+0;"
STORE = r"(st\.global\.v4\.b32 \[ %rd\d+ \+) 0 \]"
STORED = r"fence\.proxy\.async\.shared::cta;"
DESCRIPTOR = r"(add\.s64\s+%rd\d+, %rd\d+, 46116862\d+)(\d);"  # of a later part of an operand


def products(left):
    """The wait for all but ``left`` groups of wgmma."""
    return rf"wgmma\.wait_group\.sync\.aligned {left};"


def waiting(left):
    return f"wgmma.wait_group.sync.aligned {left};"


# In every run of the tests.
ON_HOPPER = (
    Planted(TMA, "keys are not waited for", WAIT, NO_WAIT),
    Planted(TMA, "too few bytes are expected", BYTES, r"\1, 128;"),
    Planted(DKDV_TMA, "gradients are not waited for", WAIT, NO_WAIT, nth=1),
    Planted(DKDV_TMA, "dk is stored before it is fenced", STORED, NOTHING, nth=2),
    Planted(DQ_TMA, "scores are used before they are there", products(0), waiting(1)),
    Planted(PINGPONG, "scores are used before they are there", products(1), waiting(2)),
    Planted(PINGPONG, "the first keys are never freed", FREE, NOTHING, nth=1),
    Planted(PINGPONG, "values are copied into a slot in use", WAIT, NO_WAIT, before="expect_tx"),
    Planted(PACK, "a store goes 16 bytes too far", STORE, r"\1 16 ]"),
)
# With the long matrices.
MORE_ON_HOPPER = (
    Planted(TMA, "a later part of the keys is read", DESCRIPTOR, r"\g<1>9;"),
    Planted(DKDV_TMA, "scores are used before they are there", products(0), waiting(1)),
    Planted(DKDV_TMA, "too few bytes are expected", BYTES, r"\1, 128;"),
    Planted(DQ_TMA, "values are not waited for", WAIT, NO_WAIT, nth=1),
    Planted(DQ_TMA, "dq is stored 16 bytes too far", STORE, r"\1 16 ]"),
    Planted(PINGPONG, "the first scores are used before they are there", products(0), waiting(1)),
    Planted(PINGPONG, "sums are used before they are there", products(0), waiting(2), nth=1),
    Planted(PINGPONG, "too few bytes are expected", BYTES, r"\1, 16384;"),
    Planted(PINGPONG, "keys are not freed by one consumer in the loop", FREE, NOTHING, nth=3),
    Planted(PINGPONG, "keys are not waited for", WAIT, NO_WAIT),
    Planted(PINGPONG, "a later part of the keys is read", DESCRIPTOR, r"\g<1>9;"),
    Planted(PINGPONG, "the producer waits for the phase that it has",
            r"not(\.b32\s+%r\d+, %r\d+;)", r"mov\1", nth=1),
    Planted(PINGPONG, "a consumer takes too many registers",
            r"setmaxnreg\.inc\.sync\.aligned\.u32(\s+)240;",
            r"setmaxnreg.inc.sync.aligned.u32\g<1>256;"),
)  # fmt: skip
ON_AMPERE = (
    Planted(FORWARD, "keys are not waited for", COPIES, "cp.async.wait_group 99;"),
    Planted(FORWARD, "keys are copied into a slot in use", BARRIER, NOTHING, nth=1),
    Planted(FORWARD, "a matrix begins 16 bytes too far",
            r"(ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 [^;]*\[%r\d+)\]", r"\1+16]"),
    Planted(DKDV, "queries are not waited for", COPIES, "cp.async.wait_group 99;"),
    Planted(DKDV, "a copy is not committed", r"cp\.async\.commit_group;", NOTHING, nth=7),
    Planted(DQ, "keys are not waited for", COPIES, "cp.async.wait_group 99;"),
    Planted(DQ, "a mask of lanes is turned round", r"@(%p\d+) st\.global", r"@!\1 st.global"),
)  # fmt: skip
