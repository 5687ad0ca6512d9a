"""Every kernel once on a small case: what a checker of memory can watch in a minute."""

from __future__ import annotations

import sys

import torch

from skiparse.bench.gpu.lab import DRY_RUN, GPU
from skiparse.pattern import SkipPattern
from skiparse.testing import check_sample, make_problem

PATTERNS = (SkipPattern.single(2), SkipPattern.group(2), SkipPattern(3, 2))


def main(device: str) -> None:
    """Forward and backward, right on a sample; lengths that fill no block."""
    setting = GPU if device == "cuda" else DRY_RUN
    N, T = (1100, 77) if device == "cuda" else (50, 7)
    for pattern in PATTERNS:
        problem = make_problem(pattern, N=N, T=T, H=2, D=128, dtype=setting.dtype, device=device)
        check_sample(problem, setting.backend("triton"), backward=True)
        print(f"{pattern}: right", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
