"""Compiles the kernels against the host twin and runs them on CPU tensors, or counts their cycles.

For the tests and the cost model: the twin computes what the accelerator would, slowly, and raises
:class:`TwinFault` where the kernel does what the hardware forbids.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from skiparse.backends import Gradients, Inputs, Outputs

TWIN = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Werror=overflow", "-fPIC")
REPORT_BYTES = 1 << 16
HEAD_DIMS = (64, 128)
MOST_IN_PART = 40  # of csrc/ascend/tiling_bwd.h
INPUTS = ("q", "k", "v", "text_q", "text_k", "text_v")
OUTPUTS = ("out", "text_out", "lse", "text_lse")


MODEL = ("guess", "costs_only", "core", "last_lane_first", "half_scores", "last_part")
GUESSES = ("fast", "typical", "slow")
Guess = Literal["fast", "typical", "slow"]


class TwinFault(AssertionError):
    """What the kernel did wrong, beginning with the sub-core and the line."""


@dataclass(frozen=True)
class Lane:
    """What one launch took of one sub-core, in cycles; ``busy`` by pipe."""

    launch: int
    core: int
    lane: str
    cycles: float
    busy: dict[str, float]


@dataclass(frozen=True)
class Buffer:
    """One in global memory: its size, and what the DMA read from it and wrote to it, in bytes.

    ``copies`` are the instructions that did.
    """

    size: int
    read: int
    written: int
    copies: int

    @property
    def moved(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Unaligned:
    """Instructions of one line at places of global memory that are no multiple of 512 bytes.

    They are slower, not wrong. Counted are all that write, and those that read scratch memory.
    """

    line: str
    instruction: str
    buffer: str
    times: int


@dataclass(frozen=True)
class Costs:
    """What the launches of a call cost by the twin's model; nothing here was measured."""

    lanes: tuple[Lane, ...]
    buffers: dict[str, Buffer]
    unaligned: tuple[Unaligned, ...]

    def cycles(self, launch: int) -> float:
        """Of the slowest core."""
        return max(lane.cycles for lane in self.lanes if lane.launch == launch)


class _Strides(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("batch", "token", "head"))


class _Model(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in MODEL)


EXECUTED = _Model(GUESSES.index("typical"), 0, -1, 0, 0, 0)


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


class _BackwardTiling(ctypes.Structure):
    """`BackwardTiling` of csrc/ascend/tiling_bwd.h."""

    _fields_ = (
        ("forward", _Tiling),
        ("grad_out", _Strides),
        ("grad_text_out", _Strides),
        ("grad_text_sub", ctypes.c_int64),
        ("most_in_part", ctypes.c_int64),
    )


class _ForwardPointers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in (*INPUTS, "mask", "text_mask", *OUTPUTS))


class _BackwardPointers(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *(*INPUTS, "mask", "text_mask", *OUTPUTS, "grad_out", "grad_text_out"),
            *(f"grad_{name}" for name in INPUTS),
        )
    )


def build(
    folder: Path, kernels: Path = TWIN / "kernels.h", *, flags: tuple[str, ...] = FLAGS
) -> ctypes.CDLL:
    """The library of the kernels in the header ``kernels``, compiled by g++ into ``folder``."""
    library = folder / "twin.so"
    command = ["g++", *flags, f"-I{TWIN}", f'-DKERNELS="{kernels}"', "-shared"]
    subprocess.run([*command, str(TWIN / "launch.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def forward(
    library: ctypes.CDLL,
    inputs: Inputs,
    *,
    cores: int = 2,
    half_scores: bool = False,
    variant: int = 0,
) -> Outputs:
    """Attention as the kernels compute it; head dimensions below 64 or 128 are padded with zeros.

    ``half_scores`` lets scores pass through global memory in half precision, which is faster by
    the model and less exact: scores must be below 65,504 before they are scaled, and the scale
    positive. ``variant`` counts the kernels that the library was built with.

    Raises:
        TwinFault: if the kernel breaks a rule of the hardware.
        ValueError: if ``half_scores`` meets a scale that is not positive.
    """
    model = _Model(GUESSES.index("typical"), 0, -1, 0, half_scores, 0)
    return _forward(library, inputs, cores, variant, model)[0]


def forward_costs(
    library: ctypes.CDLL,
    inputs: Inputs,
    *,
    cores: int,
    guess: Guess = "typical",
    core: int | None = None,
    executed: bool = False,
    last_lane_first: bool = False,
    half_scores: bool = False,
    variant: int = 0,
) -> Costs:
    """Cycles of the key biases (launch 0) and of attention (launch 1): a MODEL.

    Unless ``executed``, nothing is computed or checked, so the tensors may be of the device
    ``meta``. ``guess`` says which values the uncertain figures of cost.h take. With ``core``, that
    core alone is counted. ``executed`` and the order of the sub-cores change no figure.
    """
    one = -1 if core is None else core
    model = _Model(GUESSES.index(guess), not executed, one, last_lane_first, half_scores, 0)
    return _forward(library, inputs, cores, variant, model)[1]


def forward_of_last(
    library: ctypes.CDLL, inputs: Inputs, parts: int, *, variant: int = 0
) -> Outputs:
    """The last of ``parts`` sub-sequences of one head, each a block as long as q, k and v here.

    ``inputs`` are dense, of the last alone, and text; the kernel is told of a problem ``parts``
    times as long, and there is memory for the last part of each buffer only. So offsets may be
    larger than any memory, and a wrong one is found where it is used.

    Raises:
        TwinFault: if the kernel breaks a rule of the hardware.
    """
    (B, L, H, D), T = inputs.q.shape, inputs.text_q.shape[1]
    if (B, H, inputs.mask, inputs.text_mask) != (1, 1, None, None) or D not in HEAD_DIMS:
        raise ValueError("only one head of a batch of one, without masks, of a known dimension")
    new = inputs.q.new_empty
    outputs = Outputs(
        new(1, L, 1, D),
        new(1, 1, T, 1, D),
        new(1, 1, L, dtype=torch.float32),
        new(1, 1, 1, T, dtype=torch.float32),
    )

    def begin(last: Tensor) -> int:
        """Of the buffer whose last part this is."""
        return last.data_ptr() - (parts - 1) * last.nbytes

    six = [getattr(inputs, name) for name in INPUTS]
    tiling = _tiling(inputs, (*six, None, None))
    tiling.tokens, tiling.sparsity, tiling.run = parts * L, parts, L
    video, text = (begin(x) for x in six[:3]), (_pointer(x) for x in six[3:])
    pointers = _ForwardPointers(*video, *text, None, None, *map(begin, outputs))
    model = _Model(GUESSES.index("typical"), 0, parts - 1, 0, 0, parts)
    _call(library.skiparse_twin_forward, inputs, tiling, pointers, parts, variant, model)
    return outputs


def _forward(
    library: ctypes.CDLL, inputs: Inputs, cores: int, variant: int, model: _Model
) -> tuple[Outputs, Costs]:
    if model.half_scores and not inputs.scale > 0:
        raise ValueError(f"half_scores needs a positive scale, got {inputs.scale}")
    (B, N, H, D), T = inputs.q.shape, inputs.text_q.shape[1]
    n, tensors, padded = inputs.pattern.sparsity, _padded(inputs), _head_dim(D)
    new = inputs.q.new_empty
    outputs = Outputs(
        new(B, N, H, padded),
        new(B, n, T, H, padded),
        new(B, H, N, dtype=torch.float32),
        new(B, H, n, T, dtype=torch.float32),
    )
    pointers = _ForwardPointers(*map(_pointer, (*tensors, *outputs)))
    tiling = _tiling(inputs, tensors)
    costs = _call(library.skiparse_twin_forward, inputs, tiling, pointers, cores, variant, model)
    return Outputs(outputs.out[..., :D], outputs.text_out[..., :D], *outputs[2:]), costs


def backward(
    library: ctypes.CDLL,
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    *,
    cores: int = 2,
    most_in_part: int = MOST_IN_PART,
    variant: int = 0,
) -> Gradients:
    """Gradients as the kernels compute them: ``grad_text_out`` is ``[B, n, T, H, D]``.

    ``most_in_part`` blocks of 256 queries are taken at a time.

    Raises:
        TwinFault: if a kernel breaks a rule of the hardware.
    """
    grads = (grad_out, grad_text_out)
    return _backward(library, inputs, outputs, *grads, cores, most_in_part, variant, EXECUTED)[0]


def backward_costs(
    library: ctypes.CDLL,
    inputs: Inputs,
    outputs: Outputs,
    *,
    cores: int,
    guess: Guess = "typical",
    core: int | None = None,
    most_in_part: int = MOST_IN_PART,
    variant: int = 0,
) -> Costs:
    """Cycles of the key biases, the row values, the gradients and their sums over sub-sequences
    (launches 0 to 3), with upstream gradients as ``outputs`` are: a MODEL. See `forward_costs`.
    """
    model = _Model(GUESSES.index(guess), 1, -1 if core is None else core, 0, 0, 0)
    grads = outputs[:2]
    return _backward(library, inputs, outputs, *grads, cores, most_in_part, variant, model)[1]


def _backward(
    library: ctypes.CDLL,
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    cores: int,
    most_in_part: int,
    variant: int,
    model: _Model,
) -> tuple[Gradients, Costs]:
    D = inputs.q.shape[-1]
    tensors, padded = _padded(inputs), _head_dim(D)
    out, text_out = (_pad(x, padded).contiguous() for x in outputs[:2])
    grad_out, grad_text_out = (_pad(x, padded) for x in (grad_out, grad_text_out))
    new = inputs.q.new_empty
    gradients = Gradients(*(new(*getattr(inputs, name).shape[:-1], padded) for name in INPUTS))
    batch, sub, token, head, _ = grad_text_out.stride()
    tiling = _BackwardTiling(
        _tiling(inputs, tensors),
        _Strides(*grad_out.stride()[:3]),
        _Strides(batch, token, head),
        sub,
        most_in_part,
    )
    pointers = _BackwardPointers(
        *map(
            _pointer,
            (*tensors, out, text_out, *outputs[2:], grad_out, grad_text_out, *gradients),
        )
    )
    costs = _call(library.skiparse_twin_backward, inputs, tiling, pointers, cores, variant, model)
    return Gradients(*(x[..., :D] for x in gradients)), costs


def _head_dim(D: int) -> int:
    return next(size for size in HEAD_DIMS if size >= D)


def _pad(x: Tensor, D: int) -> Tensor:
    """``x`` with a head dimension of ``D``, the same tensor if it has."""
    return x if x.shape[-1] == D else F.pad(x, (0, D - x.shape[-1]))


def _padded(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The six inputs with a head dimension that the kernels know, and the two masks."""
    D = _head_dim(inputs.q.shape[-1])
    masks = (inputs.mask, inputs.text_mask)
    return (
        *(_pad(getattr(inputs, name), D) for name in INPUTS),
        *(None if m is None else m.contiguous() for m in masks),
    )


def _tiling(inputs: Inputs, tensors: tuple[Tensor | None, ...]) -> _Tiling:
    (B, N, H, D), T = inputs.q.shape, inputs.text_q.shape[1]
    six, masks = tensors[: len(INPUTS)], tensors[len(INPUTS) :]
    return _Tiling(
        *(B, N, T, H, _head_dim(D), inputs.pattern.sparsity, inputs.pattern.run),
        *(_Strides(*x.stride()[:3]) for x in six if x is not None),
        any(m is not None for m in masks),
        inputs.scale,
    )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()


def _call(
    function: Any,
    inputs: Inputs,
    tiling: ctypes.Structure,
    pointers: ctypes.Structure,
    cores: int,
    variant: int,
    model: _Model,
) -> Costs:
    report = ctypes.create_string_buffer(REPORT_BYTES)
    failed = function(
        variant,
        ctypes.byref(tiling),
        inputs.q.dtype == torch.bfloat16,
        cores,
        ctypes.byref(pointers),
        ctypes.byref(model),
        report,
        ctypes.c_size_t(REPORT_BYTES),
    )
    if failed:
        raise TwinFault(report.value.decode())
    found = json.loads(report.value)
    return Costs(
        tuple(Lane(**lane) for lane in found["lanes"]),
        {name: Buffer(*sizes) for name, sizes in found["global"].items()},
        tuple(Unaligned(*found) for found in found["unaligned"]),
    )


def device(library: ctypes.CDLL, guess: Guess) -> tuple[float, float, float]:
    """Bytes a second of the L2 and of the HBM, and bytes of the L2, as cost.h has them."""
    figures = [ctypes.c_double() for _ in range(3)]
    library.skiparse_twin_device(GUESSES.index(guess), *map(ctypes.byref, figures))
    l2, hbm, l2_bytes = (figure.value for figure in figures)
    return l2, hbm, l2_bytes
