"""The AscendC backend with scores that pass through memory in fp16: faster on paper, less exact.

Between the cube and the vector cores of an Atlas A2 lies only memory, and scores in fp32 are most
of what passes through it. In fp16 they are half of that: the forward kernel is projected at 1.36
times the speed (MODEL, never run on an NPU). All else stays in fp32. An option, and taken by name
only: scores (``q @ k.T``) must be below 65,504 before they are scaled, which nobody checks, and the
error of the output in fp16 is up to 7 times as large, still within that of eager attention in fp16.
"""

from __future__ import annotations

from torch import Tensor

from skiparse.backends import Gradients, Inputs, Outputs, ascendc


def why_not(inputs: Inputs | None = None, *, backward: bool = False) -> str | None:
    """What the AscendC backend says, and forward a scale that is positive.

    The backward is that of the AscendC backend, and takes what that does.
    """
    reason = ascendc.why_not(inputs, backward=backward)
    if reason is None and inputs is not None and not backward and not inputs.scale > 0:
        return f"scores in fp16 need a positive scale, not {inputs.scale}"
    return reason


def forward(inputs: Inputs) -> Outputs:
    """One kernel for video and text rows, after one for the key masks."""
    return ascendc.launch(inputs, half_scores=True)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    grad_lse: Tensor | None = None,
    grad_text_lse: Tensor | None = None,
) -> Gradients:
    """The AscendC backend's."""
    return ascendc.backward(inputs, outputs, grad_out, grad_text_out, grad_lse, grad_text_lse)
