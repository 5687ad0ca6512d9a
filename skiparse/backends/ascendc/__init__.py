"""Skiparse attention in fused AscendC kernels, for Atlas A2 and A3 (Ascend 910B and 910C).

The kernels (``csrc/``) read every sub-sequence in place, with the text as a second source of keys.
They are proven on a host twin, and have never run on an NPU. So they are only taken by name, and
only if the package was built with them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from skiparse.backends import (
    Gradients,
    Inputs,
    Outputs,
    backward_in_pieces,
    forward_in_pieces,
    with_lse_gradients,
)
from skiparse.pattern import GridPattern, Pattern, SkipPattern

_HEAD_DIMS = (64, 128)  # the kernels'; others are padded with zeros
_REACH = 65_535  # elements, or pairs of them, from row to row of one copy instruction
_HERE = Path(__file__).parents[1]  # where the extension is built to
_BUILD = (
    "on a machine with CANN and torch_npu, "
    "SKIPARSE_BUILD_ASCEND=1 pip install --no-build-isolation . in its source builds it"
)


def why_not(inputs: Inputs | None = None, *, backward: bool = False) -> str | None:
    """It takes NPU tensors in fp16 or bf16, head_dim to 128, where the extension was built."""
    if _extension() is None:
        return f"skiparse was installed without its AscendC extension; {_BUILD}"
    if not hasattr(torch, "npu") or not torch.npu.is_available():
        return "no NPU is seen by torch_npu; import torch_npu, and see `npu-smi info`"
    if inputs is None:
        return None
    if inputs.q.device.type != "npu":
        return f'the kernels take "npu" tensors, not "{inputs.q.device.type}"'
    if inputs.q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels take fp16 and bf16, not {inputs.q.dtype}"
    if inputs.q.shape[-1] > _HEAD_DIMS[-1]:
        return f"the kernels take a head dimension up to {_HEAD_DIMS[-1]}, not {inputs.q.shape[-1]}"
    if isinstance(inputs.pattern, GridPattern):
        return (
            "the kernels know the runs of a sequence, not those of a grid in natural order; put "
            'the tokens in order "skip", or in that of the kind: skiparse.pattern.grid_order'
        )
    if inputs.text_q.shape[1] != inputs.text_k.shape[1]:
        return "the kernels have a row of the text for each of its keys; give text_q"
    return None


def forward(inputs: Inputs) -> Outputs:
    """One kernel for video and text rows, after one for the key masks."""
    return launch(inputs, half_scores=False)


def launch(inputs: Inputs, *, half_scores: bool) -> Outputs:
    """`forward`, with scores that pass through memory in fp32 or, faster, less exact, in fp16."""
    return forward_in_pieces(functools.partial(_forward, half_scores=half_scores), inputs)


def _forward(inputs: Inputs, *, half_scores: bool) -> Outputs:
    D = inputs.q.shape[-1]
    masks = (None if m is None else m.contiguous() for m in (inputs.mask, inputs.text_mask))
    pattern = _of_a_sequence(inputs.pattern)
    out, text_out, lse, text_lse = _operators().attention(
        *_padded(inputs), *masks, pattern.sparsity, pattern.run, inputs.scale, half_scores
    )
    return Outputs(_cut(out, D), _cut(text_out, D), lse, text_lse)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    grad_lse: Tensor | None = None,
    grad_text_lse: Tensor | None = None,
) -> Gradients:
    """The kernels' backward, and two more calls if the log-sum-exps have gradients."""
    grads = (grad_out, grad_text_out, grad_lse, grad_text_lse)
    return backward_in_pieces(_with_lse, inputs, outputs, *grads)


def _with_lse(
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    grad_lse: Tensor | None,
    grad_text_lse: Tensor | None,
) -> Gradients:
    grads = _backward(inputs, outputs, grad_out, grad_text_out)
    return with_lse_gradients(forward, _backward, inputs, outputs, grads, grad_lse, grad_text_lse)


def _backward(
    inputs: Inputs, outputs: Outputs, grad_out: Tensor, grad_text_out: Tensor
) -> Gradients:
    """Row sums, one kernel for all gradients, and the sum of those of the text; no atomics race.

    The same bits for any number of cores: every sub-sequence is one core's, in one order.
    """
    D = inputs.q.shape[-1]
    masks = (None if m is None else m.contiguous() for m in (inputs.mask, inputs.text_mask))
    pattern = _of_a_sequence(inputs.pattern)
    grads = _operators().attention_backward(
        _pad(_near(grad_out, pattern)), _pad(grad_text_out), *_padded(inputs), *masks,
        _pad(outputs.out), _pad(outputs.text_out), outputs.lse, outputs.text_lse,
        pattern.sparsity, pattern.run, inputs.scale,
    )  # fmt: skip
    return Gradients(*(_cut(x, D) for x in grads))


def _of_a_sequence(pattern: Pattern) -> SkipPattern:
    """What is left once grids are refused and ragged blocks are cut."""
    assert isinstance(pattern, SkipPattern)
    return pattern


def _padded(inputs: Inputs) -> list[Tensor]:
    """The six inputs with a head dimension that the kernels take, within their reach."""
    pattern = _of_a_sequence(inputs.pattern)
    video = [_near(x, pattern) for x in (inputs.q, inputs.k, inputs.v)]
    return [_pad(x) for x in (*video, inputs.text_q, inputs.text_k, inputs.text_v)]


def _near(x: Tensor, pattern: SkipPattern) -> Tensor:
    """``x``, or a contiguous copy of it where its rows are too far apart to be gathered at once.

    Then an instruction copies one row, of 128 in a tile: the copy is one pass over memory.
    """

    def far(step: int) -> bool:
        return step > 2 * _REACH or (step > _REACH and step % 2 == 1)

    packed = x.shape[2] * x.shape[3]
    return (
        x.contiguous() if far(x.stride(1) * pattern.step) and not far(packed * pattern.step) else x
    )


def _pad(x: Tensor) -> Tensor:
    missing = next(size for size in _HEAD_DIMS if size >= x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _cut(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else x[..., :width].contiguous()


def _extension() -> Path | None:
    """The library of torch operators that was built, beside that of the kernels."""
    return next(_HERE.glob("_ascendc*.so"), None)


@functools.cache
def _operators() -> torch._ops._OpNamespace:
    torch.ops.load_library(str(_extension()))
    return torch.ops.skiparse_ascend
