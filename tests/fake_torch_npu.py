"""A fake of torch_npu's fused attention, on a CPU: what its documentation says, and no more.

For the tests alone. It has the operators' own schemas, computes in fp32, and refuses what the
documentation does not allow or what would make the library copy.
"""

import contextlib

import torch

# As torch_npu 2.13.0 registers them; tests/test_ascend_host.py looks for them in its library.
FORWARD = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., "
    "float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, "
    "int inner_precise=0, int[]? prefix=None, int[]? actual_seq_qlen=None, "
    "int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, '
    "int seed=0, int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
)
BACKWARD = (
    "npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, "
    "str input_layout, *, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, "
    "Tensor? softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None, "
    "Tensor? attention_in=None, float scale_value=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int seed=0, "
    "int offset=0, int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, "
    "int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Of the third variant: lengths are tensors, and all that is returned.
FORWARD_V3 = (
    "npu_fusion_attention_v3(Tensor query, Tensor key, Tensor value, int head_num, "
    "str input_layout, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, "
    "float scale=1., float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, "
    "int inner_precise=0, SymInt[]? prefix=None, Tensor? actual_seq_qlen=None, "
    "Tensor? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_V3 = (
    "npu_fusion_attention_grad_v3(Tensor query, Tensor key, Tensor value, Tensor dy, "
    "int head_num, str input_layout, *, Tensor? pse=None, Tensor? padding_mask=None, "
    "Tensor? atten_mask=None, Tensor? softmax_max=None, Tensor? softmax_sum=None, "
    "Tensor? softmax_in=None, Tensor? attention_in=None, float scale_value=1., "
    "float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, "
    "int inner_precise=0, Tensor? seed=None, Tensor? offset=None, SymInt[]? prefix=None, "
    "Tensor? actual_seq_qlen=None, Tensor? actual_seq_kvlen=None, int sparse_mode=0, "
    'bool gen_mask_parallel=True, bool sync=False, str softmax_layout="", Tensor? sink=None) '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Fake:
    """The operators; ``calls`` are the layout and the operands of each call so far.

    ``variants`` says of each call which of the operators it was.
    """

    def __init__(self):
        self.calls = []
        self.variants = []

    @contextlib.contextmanager
    def registered(self):
        """Within it, ``torch.ops.npu`` has the operators, for CPU tensors."""
        library = torch.library.Library("npu", "FRAGMENT")
        for schema, function in (
            (FORWARD, self.first(self.forward)),
            (BACKWARD, self.first(self.backward)),
            (FORWARD_V3, self.third(self.forward)),
            (BACKWARD_V3, self.third(self.backward)),
        ):
            library.define(schema)
            library.impl(schema.split("(")[0], function, "CPU")
        try:
            yield self
        finally:
            library._destroy()

    def first(self, function):
        def call(*arguments, **named):
            self.variants.append("")
            return function(*arguments, **named)

        return call

    def third(self, function):
        def lengths(x):
            assert x.device.type == "cpu"
            assert (x.dtype, x.ndim) == (torch.int64, 1)
            return x.tolist()

        def call(*arguments, **named):
            self.variants.append("v3")
            ends = {name: lengths(x) for name, x in named.items() if name.startswith("actual")}
            found = function(*arguments, **named | ends)
            if function != self.forward:
                return found
            nothing = arguments[0].new_empty(1, dtype=torch.int64)
            return *found[:4], nothing, nothing

        return call

    def forward(
        self, query, key, value, head_num, input_layout, pse=None, padding_mask=None,
        atten_mask=None, scale=1.0, keep_prob=1.0, pre_tockens=2147483647, next_tockens=2147483647,
        inner_precise=0, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0,
        gen_mask_parallel=True, sync=False, softmax_layout="",
    ):  # fmt: skip
        assert pse is padding_mask is atten_mask is prefix is None
        assert (keep_prob, inner_precise, sparse_mode, sync) == (1.0, 0, 0, False)
        assert (pre_tockens, next_tockens, gen_mask_parallel) == (2147483647, 2147483647, True)
        self.calls.append((input_layout, query, key, value))
        lengths = (actual_seq_qlen, actual_seq_kvlen)
        check(query, key, value, head_num, input_layout, *lengths)
        outs, largests, totals = [], [], []
        for q, k, v in sequences(input_layout, *lengths, query, key, value):
            scores = q @ k.mT * scale  # [heads, rows, keys]
            largest = scores.amax(-1, keepdim=True)
            weights = (scores - largest).exp()
            total = weights.sum(-1, keepdim=True)
            outs.append((weights @ v / total).transpose(0, 1))
            largests.append(largest.expand(-1, -1, 8))
            totals.append(total.expand(-1, -1, 8))
        if input_layout == "BSND":
            out, largest, total = (torch.stack(x) for x in (outs, largests, totals))
        else:
            out = torch.cat(outs)
            largest, total = (statistics(x, softmax_layout, query) for x in (largests, totals))
        return out.to(query.dtype), largest, total, query.new_empty(0), 0, 0, 0

    def backward(
        self, query, key, value, dy, head_num, input_layout, *, softmax_max, softmax_sum,
        attention_in, scale_value=1.0, actual_seq_qlen=None, actual_seq_kvlen=None,
        softmax_layout="",
    ):  # fmt: skip
        self.calls.append((input_layout, query, key, value))
        lengths = (actual_seq_qlen, actual_seq_kvlen)
        check(query, key, value, head_num, input_layout, *lengths)
        for x in (dy, attention_in):
            assert x.is_contiguous()
            assert (x.shape, x.dtype) == (query.shape, query.dtype)
        rows = sequences(input_layout, *lengths, query, key, value)
        outer = sequences(input_layout, actual_seq_qlen, actual_seq_qlen, dy, attention_in, dy)
        # Per sequence [heads, rows, 1], whatever the layout.
        if input_layout == "BSND":
            shape = (*query.shape[:1], head_num, query.shape[1], 8)
            assert softmax_max.shape == softmax_sum.shape == shape
            ends = list(zip(softmax_max[..., :1], softmax_sum[..., :1], strict=True))
        else:
            assert softmax_layout == "TND"
            assert softmax_max.shape == softmax_sum.shape == (len(query), head_num, 8)
            ends = [
                (a.transpose(0, 1)[..., :1], b.transpose(0, 1)[..., :1])
                for a, b in zip(
                    cut(softmax_max, actual_seq_qlen), cut(softmax_sum, actual_seq_qlen),
                    strict=True,
                )
            ]  # fmt: skip
        grads = ([], [], [])
        for (q, k, v), (do, o, _), (largest, total) in zip(rows, outer, ends, strict=True):
            weights = (q @ k.mT * scale_value - largest).exp() / total
            ds = weights * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * scale_value
            for grad, x in zip(grads, (ds @ k, ds.mT @ q, weights.mT @ do), strict=True):
                grad.append(x.transpose(0, 1))
        join = torch.stack if input_layout == "BSND" else torch.cat
        nothing = query.new_empty(0)
        return *(join(x).to(query.dtype) for x in grads), nothing, nothing


def check(query, key, value, heads, layout, q_ends, kv_ends):
    """The constraints that the documentation lists."""
    assert layout in ("BSND", "TND")
    assert query.ndim == (4 if layout == "BSND" else 3)
    assert query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    for x in (query, key, value):
        assert x.dtype == query.dtype
        assert x.is_contiguous()
        assert x.shape[-2:] == query.shape[-2:]
        assert x.numel() > 0
    assert key.shape == value.shape
    assert query.shape[-2] == heads <= 256
    assert query.shape[-1] <= 768
    if layout == "BSND":
        assert q_ends is None
        assert kv_ends is None
        assert len(query) == len(key)
        return
    assert len(q_ends) == len(kv_ends) <= 1000
    for x, ends in ((query, q_ends), (key, kv_ends)):
        assert ends[-1] == len(x)
        assert all(a < b for a, b in zip([0, *ends], ends, strict=False)), "an empty sequence"


def cut(x, ends):
    """The sequences of ``[all rows, heads, D]`` that end there."""
    return [x[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def sequences(layout, q_ends, kv_ends, *tensors):
    """Of each sequence the three tensors as ``[heads, rows, D]`` in fp32."""
    ends = (q_ends, kv_ends, kv_ends)
    parts = tensors if layout == "BSND" else [cut(*x) for x in zip(tensors, ends, strict=True)]
    for three in zip(*parts, strict=True):
        yield tuple(x.transpose(0, 1).float() for x in three)


def statistics(parts, softmax_layout, query):
    """``[all rows, heads, 8]``; unless asked for, in the order of (sequence, head, row)."""
    assert softmax_layout in ("", "TND")
    if softmax_layout == "TND":
        return torch.cat([x.transpose(0, 1) for x in parts])
    return torch.cat([x.reshape(-1, 8) for x in parts]).view(*query.shape[:2], 8)
