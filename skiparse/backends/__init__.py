"""What a backend is: three functions of one problem, and nothing that another backend knows.

To add one, write a module with these three functions and give it a line in
``skiparse/registry.py``. Everything above this line (checks, autograd, compile, flop counts) is
shared and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from skiparse.pattern import BlockPattern, Box, Pattern, SkipPattern


@dataclass(frozen=True)
class Inputs:
    """One attention problem, checked. Floating tensors share dtype and device, last stride 1.

    Text is always there; without any, its length ``T`` is 0. Of ``Q`` text tokens that query there
    are as many, or none, if nobody wants their outputs. Masks are key masks, True = attend.
    """

    q: Tensor  # [B, N, H, D]
    k: Tensor  # [B, N, H, D]
    v: Tensor  # [B, N, H, D]
    text_q: Tensor  # [B, Q, H, D], Q = T or 0
    text_k: Tensor  # [B, T, H, D]
    text_v: Tensor  # [B, T, H, D]
    mask: Tensor | None  # [B, N] bool
    text_mask: Tensor | None  # [B, T] bool
    pattern: Pattern  # `resolved`
    scale: float


class Outputs(NamedTuple):
    """Contiguous, freshly allocated. ``lse`` is the natural log of the sum of exponentials."""

    out: Tensor  # [B, N, H, D]
    text_out: Tensor  # [B, n, Q, H, D], one for each sub-sequence, not yet averaged
    lse: Tensor  # [B, H, N], fp32 (fp64 for fp64 inputs), -inf where every key is masked
    text_lse: Tensor  # [B, H, n, Q], likewise


class Gradients(NamedTuple):
    """Of the six inputs, in their shapes and dtype, contiguous; text summed over sub-sequences."""

    q: Tensor
    k: Tensor
    v: Tensor
    text_q: Tensor
    text_k: Tensor
    text_v: Tensor


class Backend(Protocol):
    """The three functions of a backend module."""

    def why_not(self, inputs: Inputs | None = None, *, backward: bool = False) -> str | None:
        """None if it can do this, else the reason. Without ``inputs``: can it run here at all?"""

    def forward(self, inputs: Inputs) -> Outputs:
        """Attention over every sub-sequence."""

    def backward(
        self,
        inputs: Inputs,
        outputs: Outputs,
        grad_out: Tensor,
        grad_text_out: Tensor,
        grad_lse: Tensor | None = None,
        grad_text_lse: Tensor | None = None,
    ) -> Gradients:
        """Gradients of the six inputs; ``outputs`` may come from another backend's forward.

        ``grad_out`` is ``[B, N, H, D]``, ``grad_text_out`` ``[B, n, Q, H, D]``, any strides with
        the last 1; the gradients of the log-sum-exps have their shapes, any strides, and are both
        there or both None. Where ``lse`` is -inf the row's gradients are zero.
        """


# The gradient of the log-sum-exp: for backends over library kernels, which do not take it.


def with_lse_gradients(
    forward: Callable[[Inputs], Outputs],
    backward: Callable[[Inputs, Outputs, Tensor, Tensor], Gradients],
    inputs: Inputs,
    outputs: Outputs,
    grads: Gradients,
    grad_lse: Tensor | None,
    grad_text_lse: Tensor | None,
) -> Gradients:
    """``grads`` and what the log-sum-exps add to them, by two more calls of a library.

    With ``p = exp(scores - lse)``: ``dq = scale * dlse * (p k)`` is attention with the keys as
    values, and ``dk = scale * p^T (dlse * q)`` is the gradient of the values if ``dlse * q`` is
    that of the output.
    """
    if grad_lse is None or grad_text_lse is None:
        return grads
    weight = grad_lse.transpose(1, 2).unsqueeze(-1)  # [B, N, H, 1]
    text_weight = grad_text_lse.permute(0, 2, 3, 1).unsqueeze(-1)  # [B, n, Q, H, 1]
    keys = forward(replace(inputs, v=inputs.k, text_v=inputs.text_k))
    rows = (weight * inputs.q, text_weight * inputs.text_q.unsqueeze(1))
    queries = backward(inputs, outputs, *(x.to(inputs.q.dtype) for x in rows))
    more = {
        "q": weight * keys.out,
        "k": queries.v,
        "text_q": (text_weight * keys.text_out).sum(1),
        "text_k": queries.text_v,
    }
    return grads._replace(
        **{
            name: (getattr(grads, name) + inputs.scale * x.to(weight.dtype)).to(inputs.q.dtype)
            for name, x in more.items()
        }
    )


# Ragged blocks, one behind the other: those of one length are a problem with a `SkipPattern`.


class Piece(NamedTuple):
    """Some neighbouring sub-sequences, which of the tokens are theirs, and what they are."""

    subs: slice
    tokens: slice
    pattern: SkipPattern

    def inputs(self, inputs: Inputs) -> Inputs:
        """Views of the problem's tensors, and all the text."""
        q, k, v = (x[:, self.tokens] for x in (inputs.q, inputs.k, inputs.v))
        mask = None if inputs.mask is None else inputs.mask[:, self.tokens]
        return replace(inputs, q=q, k=k, v=v, mask=mask, pattern=self.pattern)

    def outputs(self, outputs: Outputs) -> Outputs:
        """Views of the part of the outputs, or of their gradients."""
        return Outputs(
            outputs.out[:, self.tokens],
            outputs.text_out[:, self.subs],
            outputs.lse[:, :, self.tokens],
            outputs.text_lse[:, :, self.subs],
        )


def _pieces(pattern: BlockPattern, N: int) -> Iterator[Piece]:
    """Those of each length."""
    start = 0
    for segment in pattern.segments(N):
        end = start + segment.number * segment.length
        block = SkipPattern.block(segment.number, end - start)
        yield Piece(segment.slices[0], slice(start, end), block)
        start = end


def forward_in_pieces(forward: Callable[[Inputs], Outputs], inputs: Inputs) -> Outputs:
    """``forward`` of each piece of ragged blocks, put together; of other patterns, as it is."""
    if not isinstance(inputs.pattern, BlockPattern):
        return forward(inputs)
    pieces = _pieces(inputs.pattern, inputs.q.shape[1])
    outs, text_outs, lses, text_lses = zip(
        *(forward(piece.inputs(inputs)) for piece in pieces), strict=True
    )
    return Outputs(
        torch.cat(outs, 1), torch.cat(text_outs, 1), torch.cat(lses, 2), torch.cat(text_lses, 2)
    )


def backward_in_pieces(
    backward: Callable[..., Gradients],
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    grad_lse: Tensor | None,
    grad_text_lse: Tensor | None,
) -> Gradients:
    """The same of ``backward``; what the pieces give the text is summed in fp32."""
    grads = (grad_out, grad_text_out, grad_lse, grad_text_lse)
    if not isinstance(inputs.pattern, BlockPattern):
        return backward(inputs, outputs, *grads)
    found = []
    for piece in _pieces(inputs.pattern, inputs.q.shape[1]):
        here = (
            grad_out[:, piece.tokens],
            grad_text_out[:, piece.subs],
            None if grad_lse is None else grad_lse[:, :, piece.tokens],
            None if grad_text_lse is None else grad_text_lse[:, :, piece.subs],
        )
        found.append(backward(piece.inputs(inputs), piece.outputs(outputs), *here))
    columns = list(zip(*found, strict=True))
    video = (torch.cat(x, 1) for x in columns[:3])
    text = (torch.stack(x).sum(0, dtype=torch.float32).to(x[0].dtype) for x in columns[3:])
    return Gradients(*video, *text)


# The tokens of a box, as views: for backends over library kernels.


def tokens_of(video: Tensor, box: Box) -> Tensor:
    """The tokens of a box: the view ``[B, *box.shape, H, D]`` of ``[B, N, H, D]``."""
    step = video.stride(1)
    return video.as_strided(
        (video.shape[0], *box.shape, *video.shape[2:]),
        (video.stride(0), *(step * stride for stride in box.strides), *video.stride()[2:]),
        video.storage_offset() + step * box.start,
    )


def rows_of(rows: Tensor, box: Box) -> Tensor:
    """The same tokens of a segment's ``[B, S, rows, H, D]``, viewed as :func:`tokens_of` does."""
    number, *inner = box.shape
    rows = rows[:, box.at : box.at + number, box.first : box.first + box.tokens]
    return rows.unflatten(2, inner)
