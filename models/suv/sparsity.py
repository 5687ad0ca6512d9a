"""Which sparsity pays for which shape: every sub-sequence attends to the whole text again.

A layer of sparsity ``k`` over ``N`` video and ``L`` text tokens costs ``4 k (N/k + L)**2`` FLOP for
each unit of width, least at ``k = N / L``: on an image, k = 8 costs more than dense attention.
"""

from __future__ import annotations

from collections.abc import Sequence

from skiparse import SkipPattern

TEXT_TOKENS = 512
_SCALE = 16  # pixels of height and width in a token: an 8x8x8 VAE, patches of 2x2


def tokens(shape: tuple[int, int, int]) -> int:
    """Video tokens of ``(frames, height, width)`` in frames and pixels, by the released sizes.

    Raises:
        ValueError: unless frames are ``8n + 1`` and both sides multiples of 16, with the nearest
            shape that is.
    """
    frames, height, width = shape
    nearest = (
        max(round((frames - 1) / 8), 0) * 8 + 1,
        max(round(height / _SCALE), 1) * _SCALE,
        max(round(width / _SCALE), 1) * _SCALE,
    )
    if tuple(shape) != nearest:
        raise ValueError(f"shape {tuple(shape)} does not make whole tokens; nearest: {nearest}")
    return ((frames - 1) // 8 + 1) * (height // _SCALE) * (width // _SCALE)


def attention_cost(num_tokens: int, text_length: int, sparsity: int, width: int) -> int:
    """FLOP of one attention layer, ``[N, width]`` and ``[L, width]``: two products of all pairs.

    ``4 k (N/k + L)**2 * width`` where ``k`` divides ``N``, exact where it does not.
    """
    return 4 * width * SkipPattern.single(sparsity).pairs(num_tokens, text_length)


def choose(
    shape: tuple[int, int, int],
    text_length: int = TEXT_TOKENS,
    *,
    at_most: Sequence[int] = (1, 2, 4, 8, 4, 2, 1),
) -> tuple[int, ...]:
    """For each stage the cheapest sparsity, among its own halved any number of times.

    Args:
        shape: ``(frames, height, width)`` in frames and pixels.
        text_length: text tokens that take part; of trimmed text the longest prompt's.
        at_most: the sparsity of each stage as trained.

    Returns:
        One sparsity for each stage, for ``SUV.set_sparsity``.

    Raises:
        ValueError: for a shape that does not make whole tokens, or a negative text length.

    Source: the cost model above; the report uses low sparsity for images for the same reason.
    """
    if text_length < 0:
        raise ValueError(f"text_length must be >= 0, got {text_length}")
    N = tokens(shape)
    chosen = []
    for most in at_most:
        SkipPattern(most)
        halves = [most >> i for i in range(most.bit_length())]
        chosen.append(min(halves, key=lambda k: attention_cost(N, text_length, k, 1)))
    return tuple(chosen)
