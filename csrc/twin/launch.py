"""Runs the kernels on the host twin, on CPU tensors, or counts their cycles.

For the tests and the cost model: the twin computes what the accelerator would, slowly, and raises
:class:`TwinFault` where the kernel does what the hardware forbids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from csrc import build
from skiparse.backends import Gradients, Inputs, Outputs

HEAD_DIMS = (64, 128)
MOST_IN_PART = 40  # of csrc/ascend/tiling_bwd.h
INPUTS = ("q", "k", "v", "text_q", "text_k", "text_v")
OUTPUTS = ("out", "text_out", "lse", "text_lse")


GUESSES = ("fast", "typical", "slow")
Guess = Literal["fast", "typical", "slow"]


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


def load(folder: Path) -> ModuleType:
    """The kernels as they are on the twin, built by CMake in ``folder``; a second time at once."""
    build.build(folder, "twin", SKIPARSE_TWIN=True)
    return build.load("twin", folder / "twin.so")


def forward(
    library: ModuleType,
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
    model = model_of(library, half_scores=half_scores)
    return _forward(library, inputs, cores, variant, model)[0]


def forward_costs(
    library: ModuleType,
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
    model = model_of(
        library,
        guess=guess,
        costs_only=not executed,
        core=core,
        last_lane_first=last_lane_first,
        half_scores=half_scores,
    )
    return _forward(library, inputs, cores, variant, model)[1]


def forward_of_last(
    library: ModuleType, inputs: Inputs, parts: int, *, variant: int = 0
) -> Outputs:
    """The last of ``parts`` sub-sequences of one head, each a block as long as q, k and v here.

    ``inputs`` are dense, of the last alone, and text; the kernel is told of a problem ``parts``
    times as long, and there is memory for the last part of each buffer only. So offsets may be
    larger than any memory, and a wrong one is found where it is used.

    Raises:
        TwinFault: if the kernel breaks a rule of the hardware.
    """
    (_, L, _, D), T = inputs.q.shape, inputs.text_q.shape[1]
    new = inputs.q.new_empty
    outputs = Outputs(
        new(1, L, 1, D),
        new(1, 1, T, 1, D),
        new(1, 1, L, dtype=torch.float32),
        new(1, 1, 1, T, dtype=torch.float32),
    )
    tensors = {name: getattr(inputs, name) for name in INPUTS} | outputs._asdict()
    library.forward_of_last(
        arrays(library, tensors), scale=inputs.scale, parts=parts, variant=variant
    )
    return outputs


def _forward(
    library: ModuleType, inputs: Inputs, cores: int, variant: int, model: Any
) -> tuple[Outputs, Costs]:
    (B, N, H, D), T = inputs.q.shape, inputs.text_q.shape[1]
    n, padded = inputs.pattern.sparsity, _head_dim(D)
    new = inputs.q.new_empty
    outputs = Outputs(
        new(B, N, H, padded),
        new(B, n, T, H, padded),
        new(B, H, N, dtype=torch.float32),
        new(B, H, n, T, dtype=torch.float32),
    )
    tensors = _padded(inputs) | outputs._asdict()
    found = library.forward(
        arrays(library, tensors), **_settings(inputs), cores=cores, variant=variant, model=model
    )
    return Outputs(outputs.out[..., :D], outputs.text_out[..., :D], *outputs[2:]), costs(found)


def backward(
    library: ModuleType,
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
    model = model_of(library)
    return _backward(library, inputs, outputs, *grads, cores, most_in_part, variant, model)[0]


def backward_costs(
    library: ModuleType,
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
    model = model_of(library, guess=guess, costs_only=True, core=core)
    grads = outputs[:2]
    return _backward(library, inputs, outputs, *grads, cores, most_in_part, variant, model)[1]


def _backward(
    library: ModuleType,
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    cores: int,
    most_in_part: int,
    variant: int,
    model: Any,
) -> tuple[Gradients, Costs]:
    D = inputs.q.shape[-1]
    padded = _head_dim(D)
    new = inputs.q.new_empty
    gradients = Gradients(*(new(*getattr(inputs, name).shape[:-1], padded) for name in INPUTS))
    tensors = {
        **_padded(inputs),
        "out": _pad(outputs.out, padded).contiguous(),
        "text_out": _pad(outputs.text_out, padded).contiguous(),
        "lse": outputs.lse,
        "text_lse": outputs.text_lse,
        "grad_out": _pad(grad_out, padded),
        "grad_text_out": _pad(grad_text_out, padded),
        **{f"grad_{name}": x for name, x in zip(INPUTS, gradients, strict=True)},
    }
    found = library.backward(
        arrays(library, tensors),
        **_settings(inputs),
        cores=cores,
        most_in_part=most_in_part,
        variant=variant,
        model=model,
    )
    return Gradients(*(x[..., :D] for x in gradients)), costs(found)


def _head_dim(D: int) -> int:
    return next(size for size in HEAD_DIMS if size >= D)


def _pad(x: Tensor, D: int) -> Tensor:
    """``x`` with a head dimension of ``D``, the same tensor if it has."""
    return x if x.shape[-1] == D else F.pad(x, (0, D - x.shape[-1]))


def _padded(inputs: Inputs) -> dict[str, Tensor]:
    """The six inputs with a head dimension that the kernels know, and the masks there are."""
    D = _head_dim(inputs.q.shape[-1])
    masks = {"mask": inputs.mask, "text_mask": inputs.text_mask}
    return {
        **{name: _pad(getattr(inputs, name), D) for name in INPUTS},
        **{name: mask.contiguous() for name, mask in masks.items() if mask is not None},
    }


def arrays(library: ModuleType, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Where the tensors lie and what they hold. The library checks them; nobody copies them."""
    return {
        name: library.Array(
            x.data_ptr(), x.device.type, str(x.dtype).removeprefix("torch."), x.shape, x.stride()
        )
        for name, x in tensors.items()
    }


def _settings(inputs: Inputs) -> dict[str, Any]:
    pattern = inputs.pattern
    return {"sparsity": pattern.sparsity, "run": pattern.run, "scale": inputs.scale}


def model_of(
    library: ModuleType,
    *,
    guess: Guess = "typical",
    costs_only: bool = False,
    core: int | None = None,
    last_lane_first: bool = False,
    half_scores: bool = False,
) -> Any:
    """What to run or to count, as the library has it: see `forward_costs`."""
    return library.Model(
        guess=GUESSES.index(guess),
        costs_only=costs_only,
        core=-1 if core is None else core,
        last_lane_first=last_lane_first,
        half_scores=half_scores,
    )


def costs(
    found: tuple[list[tuple[Any, ...]], dict[str, tuple[int, ...]], list[tuple[Any, ...]]],
) -> Costs:
    """What `costs` of csrc/twin/python.h gives, with names."""
    lanes, buffers, unaligned = found
    return Costs(
        tuple(Lane(*lane) for lane in lanes),
        {name: Buffer(*sizes) for name, sizes in buffers.items()},
        tuple(Unaligned(*place) for place in unaligned),
    )


def device(library: ModuleType, guess: Guess) -> tuple[float, float, float]:
    """Bytes a second of the L2 and of the HBM, and bytes of the L2, as cost.h has them."""
    l2, hbm, l2_bytes = library.device(GUESSES.index(guess))
    return l2, hbm, l2_bytes
