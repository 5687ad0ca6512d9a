"""Skiparse attention in fused Triton kernels that read every sub-sequence in place.

Tokens are found by index arithmetic inside the kernel, so any pattern, length, stride or mask is
taken without a copy, and the text is a second source of keys instead of ``n`` replicas. Forward
and backward are deterministic: no atomics, one fixed order for every sum.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from skiparse.backends import (
    Gradients,
    Inputs,
    Outputs,
    backward_in_pieces,
    forward_in_pieces,
)
from skiparse.pattern import BlockPattern

_TOKENS = 2**31 - 256  # 32 bits, less the rows of a block that may hang over the end
_BLOCKS = 2**31 - 1  # CUDA's x axis; of 16 rows or more. Triton launches none beyond, and is silent


def why_not(inputs: Inputs | None = None, *, backward: bool = False) -> str | None:
    """It takes a CUDA or HIP device, or a CPU under Triton's interpreter; head_dim to 256."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if inputs is None:
        if interpreted or torch.cuda.is_available():
            return None
        return "there is no CUDA or HIP device, and TRITON_INTERPRET=1 is not set"
    q = inputs.q
    if q.device.type not in ("cpu", "cuda"):
        return f'the kernels run on "cuda" tensors, not "{q.device.type}"'
    if q.device.type == "cpu" and not interpreted:
        return 'the kernels take "cpu" tensors only if TRITON_INTERPRET=1 is set'
    if q.dtype == torch.bfloat16 and interpreted:
        return f"Triton's interpreter multiplies {q.dtype} wrongly (triton#11584)"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take fp32, bf16 and fp16, not {q.dtype}"
    if q.shape[-1] > 256:
        return f"the kernels take a head dimension up to 256, not {q.shape[-1]}"
    if q.device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(q.device)
        if major < 8:
            return f"the kernels need compute capability 8.0, and {q.device} has {major}.{minor}"
    (B, N, H, _), T, n = q.shape, inputs.text_k.shape[1], inputs.pattern.sparsity
    run = 1 if isinstance(inputs.pattern, BlockPattern) else inputs.pattern.run
    largest = max(N, T, n * run)
    if largest >= _TOKENS:
        return f"the kernels count tokens, and sparsity * run, to {_TOKENS - 1}, not to {largest}"
    longest = inputs.pattern.length(0, N)
    blocks = B * H * n * (-(-longest // 16) + -(-T // 16))
    if blocks > _BLOCKS:
        return f"the kernels take up to {_BLOCKS} blocks of rows, not {blocks}"
    return None


def forward(inputs: Inputs) -> Outputs:
    """One kernel for video and text rows; of ragged blocks, for each length."""
    from skiparse.backends.triton.forward_kernel import forward as launch

    return forward_in_pieces(launch, inputs)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    grad_lse: Tensor | None = None,
    grad_text_lse: Tensor | None = None,
) -> Gradients:
    """One kernel for dk and dv, one for dq, none with atomics; text summed over sub-sequences."""
    from skiparse.backends.triton.backward_kernel import backward as launch

    grads = (grad_out, grad_text_out, grad_lse, grad_text_lse)
    return backward_in_pieces(launch, inputs, outputs, *grads)
