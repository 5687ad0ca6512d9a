"""Stand-ins of the CUDA libraries: they compute on the CPU what a library would on the device.

Those of torch's operators hold the arguments against torch's own schemas and give outputs the
layout that torch's own shape functions say; those of FlashAttention 3 and 4 have the packages'
signatures. All refuse rows that the library could not read.
"""

import types

import torch
from torch.utils._pytree import tree_map_only


def attend(q, k, v, scale):
    """Attention over ``[batch, heads, rows, D]`` and its log-sum-exp."""
    scores = q.float() @ k.float().mT * scale
    return scores.softmax(-1) @ v.float(), scores.logsumexp(-1)


def attend_backward(grad, q, k, v, out, lse, scale):
    """From the output and its log-sum-exp, as the libraries do it."""
    grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
    p = (q @ k.mT * scale - lse[..., None]).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ grad


class Operators:
    """Torch's attention operators for CUDA, on CPU tensors."""

    def __init__(self):
        self.plans = {}
        self._scaled_dot_product_flash_attention_for_cpu = None  # not to be called

    def outputs(self, name, args, kwargs):
        """Empty outputs, in the layout that torch's shape function of the operator gives."""

        def meta(x):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

        args, kwargs = tree_map_only(torch.Tensor, meta, (args, kwargs))
        return tree_map_only(
            torch.Tensor,
            lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype),
            getattr(torch.ops.aten, name)(*args, **kwargs),
        )

    def _scaled_dot_product_cudnn_attention(self, *args, **kwargs):
        assert args[4], "the log-sum-exp must be asked for"
        readable(*args[:3], apart=True)
        found = self.outputs("_scaled_dot_product_cudnn_attention", args, kwargs)
        out, lse = attend(*args[:3], kwargs["scale"])
        found[0].copy_(out)
        found[1].copy_(lse[..., None])  # [batch, heads, rows, 1]
        return found

    def _scaled_dot_product_cudnn_attention_backward(self, *args, **kwargs):
        found = self.outputs("_scaled_dot_product_cudnn_attention_backward", args, kwargs)
        grad, q, k, v, out, lse = args[:6]
        readable(*args[:5], apart=True)
        assert lse.shape == (*q.shape[:3], 1)
        assert lse.is_contiguous()
        assert args[11:13] == (q.shape[2], k.shape[2])
        # The plan of the first call with such q, k and v reads all others as it did that one.
        key = tuple((x.shape, x.stride()) for x in (q, k, v))
        strides = self.plans.setdefault(key, (grad.stride(), out.stride()))
        grad, out = (
            x.as_strided(x.shape, stride) if reaches(x, stride) else torch.full_like(x, torch.nan)
            for x, stride in zip((grad, out), strides, strict=True)
        )
        for x, value in zip(
            found,
            attend_backward(grad, q, k, v, out, lse.squeeze(-1), kwargs["scale"]),
            strict=True,
        ):
            x.copy_(value)
        return found

    def _scaled_dot_product_flash_attention(self, *args, **kwargs):
        readable(*args[:3], apart=False)
        found = self.outputs("_scaled_dot_product_flash_attention", args, kwargs)
        out, lse = attend(*args[:3], kwargs["scale"])
        found[0].copy_(out)
        found[1].copy_(lse)
        return found

    def _scaled_dot_product_flash_attention_backward(self, *args, **kwargs):
        found = self.outputs("_scaled_dot_product_flash_attention_backward", args, kwargs)
        grad, q, k, v, out, lse = args[:6]
        readable(*args[:5], apart=False)
        assert lse.shape == q.shape[:3]
        assert lse.is_contiguous()
        assert args[8:10] == (q.shape[2], k.shape[2])
        values = attend_backward(grad, q, k, v, out, lse, kwargs["scale"])
        for x, value in zip(found, values, strict=True):
            x.copy_(value)
        return found


def readable(*tensors, apart):
    """Whether loads of 16 bytes, and bulk copies if strides must be ``apart``, take these."""
    for x in tensors:
        steps = [x.stride(i) for i in range(3) if x.shape[i] > 1]
        assert x.stride(3) == 1
        assert all(n * x.element_size() % 16 == 0 for n in (x.storage_offset(), *steps))
        assert not apart or 0 not in steps


def reaches(x, stride):
    """Whether the storage of ``x`` holds all that these strides would read."""
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, stride, strict=True))
    return last * x.element_size() < x.untyped_storage().nbytes()


def fa3_module(release):
    """`flash_attn_interface`: ``[batch, rows, heads, D]``; two of its releases."""
    module = types.ModuleType("flash_attn_interface")

    def forward(q, k, v, others, softmax_scale, causal):
        assert all(x is None for x in others)
        assert not causal
        readable(q, k, v, apart=True)
        out, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale)
        none = q.new_empty(0)
        return out.transpose(1, 2).to(q.dtype).contiguous(), lse.contiguous(), none, none

    def backward(dout, q, k, v, out, lse, others, grads, softmax_scale, causal, deterministic):
        assert all(x is None for x in others)
        assert not causal
        module.deterministic = deterministic
        readable(dout, q, k, v, out, apart=True)
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        assert lse.is_contiguous()
        rows = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        values = attend_backward(*rows, lse, softmax_scale)
        for x, value in zip(grads, values, strict=True):
            x.copy_(value.transpose(1, 2))

    if release == 2026:

        def _flash_attn_forward(
            q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None,
            cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None,
            max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None,
            leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
            k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1,
            window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True,
            scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
        ):  # fmt: skip
            others = [
                k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
                seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k,
                rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale,
            ]  # fmt: skip
            assert (window_size_left, window_size_right, num_splits) == (-1, -1, 1)
            return forward(q, k, v, others, softmax_scale, causal)

        def _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
            sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
            softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
            softcap=0.0, deterministic=False, sm_margin=0,
        ):  # fmt: skip
            others = [cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k]
            grads = (dq, dk, dv)
            backward(
                dout, q, k, v, out, softmax_lse, others, grads, softmax_scale, is_causal,
                deterministic,
            )  # fmt: skip

    else:

        def _flash_attn_forward(
            q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new,
            seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k,
            rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale,
            softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
            rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
            sm_margin=0,
        ):  # fmt: skip
            return forward(q, k, v, [k_new, out, v_descale], softmax_scale, causal)

        def _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k,
            max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1),
            softcap=0.0, deterministic=False, sm_margin=0,
        ):  # fmt: skip
            others, grads = [cu_seqlens_q, max_seqlen_k], (dq, dk, dv)
            backward(
                dout, q, k, v, out, softmax_lse, others, grads, softmax_scale, causal,
                deterministic,
            )  # fmt: skip

    module._flash_attn_forward = _flash_attn_forward
    module._flash_attn_backward = _flash_attn_backward
    return module


def fa4_module(values):
    """`flash_attn.cute.interface`: ``[batch, rows, heads, D]``, gradients returned.

    The forward returns so many ``values``: 2 up to 4.0.0b18, then 4, and 5 in 4.0.0b36.
    """
    module = types.ModuleType("flash_attn.cute.interface")

    def _flash_attn_fwd(
        q, k, v, qv=None, *, softmax_scale=None, causal=False, num_splits=1, return_lse=False
    ):
        assert return_lse
        assert not causal
        readable(q, k, v, apart=True)
        out, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale)
        others = [None] * (values - 2)
        return out.transpose(1, 2).to(q.dtype).contiguous(), lse.contiguous(), *others

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False
    ):
        readable(dout, q, k, v, out, apart=True)
        assert lse.is_contiguous()
        assert not causal
        module.deterministic = deterministic
        rows = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        values = attend_backward(*rows, lse, softmax_scale)
        return tuple(x.transpose(1, 2).to(q.dtype).contiguous() for x in values)

    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return module
