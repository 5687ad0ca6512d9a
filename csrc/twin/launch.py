"""Compiles the kernels against the host twin and runs them on CPU tensors.

For the tests alone: the twin computes what the accelerator would, slowly, and raises
:class:`TwinFault` where the kernel does what the hardware forbids.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F

from skiparse.backends import Inputs, Outputs

TWIN = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Werror=overflow", "-fPIC")
REPORT_BYTES = 4096
HEAD_DIMS = (64, 128)
INPUTS = ("q", "k", "v", "text_q", "text_k", "text_v")
OUTPUTS = ("out", "text_out", "lse", "text_lse")


class TwinFault(AssertionError):
    """What the kernel did wrong, beginning with the sub-core and the line."""


class _Strides(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("batch", "token", "head"))


class _Tiling(ctypes.Structure):
    """`Tiling` of csrc/ascend/tiling.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "tokens", "text", "heads", "head_dim", "sparsity", "run")
        ),
        *((name, _Strides) for name in INPUTS),
        ("masked", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class _ForwardPointers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in (*INPUTS, "mask", "text_mask", *OUTPUTS))


def build(
    folder: Path, kernels: Path = TWIN / "kernels.h", *, flags: tuple[str, ...] = FLAGS
) -> ctypes.CDLL:
    """The library of the kernels in the header ``kernels``, compiled by g++ into ``folder``."""
    library = folder / "twin.so"
    command = ["g++", *flags, f"-I{TWIN}", f'-DKERNELS="{kernels}"', "-shared"]
    subprocess.run([*command, str(TWIN / "launch.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def forward(library: ctypes.CDLL, inputs: Inputs, *, cores: int = 2, variant: int = 0) -> Outputs:
    """Attention as the kernels compute it; head dimensions below 64 or 128 are padded with zeros.

    ``variant`` counts the kernels that the library was built with.

    Raises:
        TwinFault: if the kernel breaks a rule of the hardware.
    """
    (B, N, H, D), T = inputs.q.shape, inputs.text_q.shape[1]
    n, w, dtype = inputs.pattern.sparsity, inputs.pattern.run, inputs.q.dtype
    padded = next(size for size in HEAD_DIMS if size >= D)
    tensors = {
        name: x if padded == D else F.pad(x, (0, padded - D))
        for name, x in ((name, getattr(inputs, name)) for name in INPUTS)
    }
    masks = {name: getattr(inputs, name) for name in ("mask", "text_mask")}
    masks = {name: None if m is None else m.contiguous() for name, m in masks.items()}
    outputs = Outputs(
        torch.empty(B, N, H, padded, dtype=dtype),
        torch.empty(B, n, T, H, padded, dtype=dtype),
        torch.empty(B, H, N),
        torch.empty(B, H, n, T),
    )
    tiling = _Tiling(
        *(B, N, T, H, padded, n, w),
        *(_Strides(*x.stride()[:3]) for x in tensors.values()),
        any(m is not None for m in masks.values()),
        inputs.scale,
    )
    pointers = _ForwardPointers(
        *(
            None if x is None or x.numel() == 0 else x.data_ptr()
            for x in (*tensors.values(), *masks.values(), *outputs)
        )
    )
    report = ctypes.create_string_buffer(REPORT_BYTES)
    failed = library.skiparse_twin_forward(
        variant,
        ctypes.byref(tiling),
        dtype == torch.bfloat16,
        cores,
        ctypes.byref(pointers),
        report,
        ctypes.c_size_t(REPORT_BYTES),
    )
    if failed:
        raise TwinFault(report.value.decode())
    return Outputs(outputs.out[..., :D], outputs.text_out[..., :D], *outputs[2:])
