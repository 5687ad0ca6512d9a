"""Executes on a CPU what Triton compiled for an NVIDIA GPU: the GPU's twin in the tests.

Kernels are launched by the project's own launchers through Triton's own host path, on a libcuda
that records (``driver``); each launch's PTX is parsed (``program``), put into an order in which
numpy has much to do at a time (``schedule``), and executed block by block (``machine``).

Everything that the hardware does while a warp goes on happens here as early as it may, as late as
it may, or at random: wgmma, cp.async, bulk tensor copies; and warps take turns at random. A kernel
that is right gives the same bits in every one of these. See README.md for what this can't see.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # of csrc/build.py, for processes in this folder
