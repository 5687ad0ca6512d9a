"""Skiparse attention: sparse attention for video transformers, forward and backward.

::

    import skiparse
    from skiparse import SkipPattern

    out = skiparse.attention(q, k, v, SkipPattern.group(4))      # [batch, tokens, heads, dim]
"""

from skiparse._version import __version__
from skiparse.functional import attention, attention_with_lse, joint_attention, key_mask
from skiparse.pack import Packed, norm_rope_pack, packing_pays, unpack
from skiparse.pattern import GridPattern, SkipPattern
from skiparse.registry import list_backends

__all__ = [
    "GridPattern",
    "Packed",
    "SkipPattern",
    "__version__",
    "attention",
    "attention_with_lse",
    "joint_attention",
    "key_mask",
    "list_backends",
    "norm_rope_pack",
    "packing_pays",
    "unpack",
]
