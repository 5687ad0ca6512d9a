"""The Triton backend with another forward kernel: for Hopper, its warps having roles. Optional.

Written in Gluon, Triton's language below Triton, which changes with releases; so it is taken by
name only, or where a table measured on the device puts it first.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from skiparse.backends import Gradients, Inputs, Outputs, triton

RELEASES = ("3.6", "3.7")


def why_not(inputs: Inputs | None = None, *, backward: bool = False) -> str | None:
    """It takes regular strides and lengths on Hopper in half precision.

    The backward is that of the Triton backend, and takes what that does.
    """
    reason = triton.why_not(inputs, backward=backward)
    if reason is not None:
        return reason
    import triton as module  # whose distribution may have another name: a nightly's has

    release = module.__version__
    if not release.startswith(tuple(f"{known}." for known in RELEASES)):
        return f"the kernel is written for Triton {' and '.join(RELEASES)}, not {release}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter does not run Gluon"
    device = None if inputs is None else inputs.q.device
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return "the kernel is for NVIDIA GPUs of compute capability 9.0"
    return None if inputs is None or backward else _takes(inputs)


def _takes(inputs: Inputs) -> str | None:
    from skiparse.backends.triton import tiles
    from skiparse.backends.triton.forward_kernel import can_be_tiled, positive
    from skiparse.backends.triton.pingpong_kernel import HEAD_DIMS, TILES

    q = inputs.q
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes fp16 and bf16, not {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"the kernel takes head dimensions {HEAD_DIMS}, not {q.shape[-1]}"
    if inputs.text_q.shape[1] != inputs.text_k.shape[1]:
        return "the kernel takes as many queries of the text as keys"
    if not positive(inputs.scale):
        return f"the kernel takes a positive scale, not {inputs.scale}"
    if not can_be_tiled(inputs, TILES["BLOCK_N"]):
        return "blocks of keys are no boxes in these strides, or this length and pattern"
    if not tiles.can_be_tiled(inputs, TILES["BLOCK_M"] // 2, (q, inputs.text_q)):
        return "blocks of queries are no boxes in these strides"
    return None


def forward(inputs: Inputs) -> Outputs:
    """One kernel for video and text rows."""
    from skiparse.backends.triton.pingpong_kernel import forward as launch

    return launch(inputs)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    grad_lse: Tensor | None = None,
    grad_text_lse: Tensor | None = None,
) -> Gradients:
    """The Triton backend's."""
    return triton.backward(inputs, outputs, grad_out, grad_text_out, grad_lse, grad_text_lse)
