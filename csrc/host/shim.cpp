// torch.ops.skiparse_ascend: the kernels as operators of torch, on the task queue of torch_npu. Has
// never run on an NPU.
//
// torch_npu may enqueue work from the host later than it is called, so a launch is handed to its
// queue, and takes the stream without draining that queue. Memory needs no more care than for
// torch_npu's own operators: it is reused in the order of the stream.
#include <array>
#include <cstring>
#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

#include "launch.h"

namespace {

using at::Tensor;
using skiparse::Strides;
using skiparse::Tiling;

void check_rows(const char* name, const Tensor& x, const Tensor& q, int64_t rows) {
    TORCH_CHECK(x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == rows &&
                    x.size(2) == q.size(2) && x.size(3) == q.size(3),
                name, " has shape ", x.sizes(), ", expected [", q.size(0), ", ", rows, ", ",
                q.size(2), ", ", q.size(3), "]");
    TORCH_CHECK(x.scalar_type() == q.scalar_type() && x.device() == q.device(), name,
                " must have the dtype and the device of q");
    TORCH_CHECK(x.numel() == 0 || x.stride(3) == 1, name, " must have last stride 1, not ",
                x.stride(3));
}

void check_mask(const char* name, const std::optional<Tensor>& mask, const Tensor& q,
                int64_t rows) {
    if (!mask.has_value()) return;
    TORCH_CHECK(mask->scalar_type() == at::kBool && mask->device() == q.device() &&
                    mask->is_contiguous() && mask->sizes() == at::IntArrayRef({q.size(0), rows}),
                name, " must be a contiguous bool tensor [", q.size(0), ", ", rows,
                "] on the device of q");
}

void check_saved(const char* name, const Tensor& x, const Tensor& q, at::ScalarType dtype,
                 at::IntArrayRef shape) {
    TORCH_CHECK(x.sizes() == shape && x.scalar_type() == dtype && x.device() == q.device() &&
                    x.is_contiguous(),
                name, " must be a contiguous tensor of ", dtype, " ", shape,
                " on the device of q, got ", x.scalar_type(), " ", x.sizes());
}

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

void* pointer(const Tensor& x) { return x.numel() == 0 ? nullptr : x.data_ptr(); }

void* pointer(const std::optional<Tensor>& x) { return x.has_value() ? pointer(*x) : nullptr; }

Tensor bytes(const Tensor& like, int64_t count) {
    return at::empty({count}, like.options().dtype(at::kByte));
}

SkiparseCores cores_of(const c10_npu::NPUStream& stream) {
    SkiparseCores cores{};
    const int error = skiparse_ascend_cores(stream.stream(false), &cores);
    TORCH_CHECK(error == 0, "CANN does not say how many cores the stream may use: error ", error);
    TORCH_CHECK(cores.cube >= 1, "the stream may use no cube core with two vector cores; see "
                "torch_npu.npu.set_stream_limit");
    return cores;
}

Tiling checked_tiling(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& text_q,
                      const Tensor& text_k, const Tensor& text_v, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& text_mask, int64_t sparsity, int64_t run,
                      double scale) {
    TORCH_CHECK(q.dim() == 4 && text_q.dim() == 4, "q and text_q must be [batch, rows, heads, dim]");
    TORCH_CHECK(q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16,
                "q must be fp16 or bf16, got ", q.scalar_type());
    TORCH_CHECK(q.size(3) == 64 || q.size(3) == 128, "head_dim must be 64 or 128, got ", q.size(3),
                "; pad with zeros");
    TORCH_CHECK(sparsity >= 1 && run >= 1, "sparsity and run must be at least 1");
    const int64_t tokens = q.size(1), text = text_q.size(1);
    check_rows("q", q, q, tokens);
    check_rows("k", k, q, tokens);
    check_rows("v", v, q, tokens);
    check_rows("text_q", text_q, q, text);
    check_rows("text_k", text_k, q, text);
    check_rows("text_v", text_v, q, text);
    check_mask("mask", mask, q, tokens);
    check_mask("text_mask", text_mask, q, text);
    return {q.size(0), tokens, text, q.size(2), q.size(3), sparsity, run, strides_of(q),
            strides_of(k), strides_of(v), strides_of(text_q), strides_of(text_k),
            strides_of(text_v), mask.has_value() || text_mask.has_value(),
            static_cast<float>(scale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& text_q, const Tensor& text_k,
    const Tensor& text_v, const std::optional<Tensor>& mask, const std::optional<Tensor>& text_mask,
    int64_t sparsity, int64_t run, double scale, bool half_scores) {
    const Tiling t = checked_tiling(q, k, v, text_q, text_k, text_v, mask, text_mask, sparsity, run,
                                    scale);
    TORCH_CHECK(!half_scores || scale > 0, "half_scores needs a positive scale, not ", scale);
    const c10::DeviceGuard guard(q.device());
    const auto fp32 = q.options().dtype(at::kFloat);
    const Tensor out = at::empty({t.batch, t.tokens, t.heads, t.head_dim}, q.options());
    const Tensor text_out =
        at::empty({t.batch, sparsity, t.text, t.heads, t.head_dim}, q.options());
    const Tensor lse = at::empty({t.batch, t.heads, t.tokens}, fp32);
    const Tensor text_lse = at::empty({t.batch, t.heads, sparsity, t.text}, fp32);

    const c10_npu::NPUStream stream = c10_npu::getCurrentNPUStream();
    const SkiparseCores cores = cores_of(stream);
    const Tensor bias = bytes(q, skiparse::bias_bytes(t));
    const Tensor workspace = bytes(q, cores.cube * skiparse::WORKSPACE_BYTES);
    const skiparse::ForwardPointers pointers{
        pointer(q), pointer(k), pointer(v), pointer(text_q), pointer(text_k), pointer(text_v),
        pointer(mask), pointer(text_mask), pointer(out), pointer(text_out), pointer(lse),
        pointer(text_lse)};
    const skiparse::ForwardScratch scratch{pointer(bias), pointer(workspace)};
    const bool bf16 = q.scalar_type() == at::kBFloat16;
    at_npu::native::OpCommand::RunOpApiV2("skiparse_attention_fwd", [=]() -> int {
        return skiparse_attention_fwd(stream.stream(false), &cores, &t, bf16, half_scores,
                                      &pointers, &scratch);
    });
    return {out, text_out, lse, text_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& grad_text_out, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& text_q, const Tensor& text_k, const Tensor& text_v,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& text_mask, const Tensor& out,
    const Tensor& text_out, const Tensor& lse, const Tensor& text_lse, int64_t sparsity,
    int64_t run, double scale) {
    const Tiling t = checked_tiling(q, k, v, text_q, text_k, text_v, mask, text_mask, sparsity, run,
                                    scale);
    check_rows("grad_out", grad_out, q, t.tokens);
    const std::array<int64_t, 5> parts{t.batch, sparsity, t.text, t.heads, t.head_dim};
    TORCH_CHECK(grad_text_out.sizes() == at::IntArrayRef(parts), "grad_text_out has shape ",
                grad_text_out.sizes(), ", expected ", at::IntArrayRef(parts));
    for (int64_t sub = 0; sub < sparsity; ++sub) {
        check_rows("grad_text_out", grad_text_out.select(1, sub), q, t.text);
    }
    check_saved("out", out, q, q.scalar_type(), {t.batch, t.tokens, t.heads, t.head_dim});
    check_saved("text_out", text_out, q, q.scalar_type(), parts);
    check_saved("lse", lse, q, at::kFloat, {t.batch, t.heads, t.tokens});
    check_saved("text_lse", text_lse, q, at::kFloat, {t.batch, t.heads, sparsity, t.text});

    const c10::DeviceGuard guard(q.device());
    const skiparse::BackwardTiling b{
        t,
        strides_of(grad_out),
        {grad_text_out.stride(0), grad_text_out.stride(2), grad_text_out.stride(3)},
        grad_text_out.stride(1),
        skiparse::MOST_IN_PART};
    const auto like = [](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
    const Tensor grad_q = like(q), grad_k = like(q), grad_v = like(q);
    const Tensor grad_text_q = like(text_q), grad_text_k = like(text_q), grad_text_v = like(text_q);

    const c10_npu::NPUStream stream = c10_npu::getCurrentNPUStream();
    const SkiparseCores cores = cores_of(stream);
    const Tensor bias = bytes(q, skiparse::bias_bytes(t));
    const Tensor values = bytes(q, skiparse::row_values_bytes(t));
    const Tensor text_parts = bytes(q, skiparse::text_parts_bytes(t));
    const Tensor workspace = bytes(q, cores.cube * skiparse::backward_workspace_bytes(b));
    const Tensor key_sums = bytes(q, cores.cube * skiparse::key_sums_bytes(b));
    const skiparse::BackwardPointers pointers{
        pointer(q), pointer(k), pointer(v), pointer(text_q), pointer(text_k), pointer(text_v),
        pointer(mask), pointer(text_mask), pointer(out), pointer(text_out), pointer(lse),
        pointer(text_lse), pointer(grad_out), pointer(grad_text_out), pointer(grad_q),
        pointer(grad_k), pointer(grad_v), pointer(grad_text_q), pointer(grad_text_k),
        pointer(grad_text_v)};
    const skiparse::BackwardScratch scratch{pointer(bias), pointer(values), pointer(text_parts),
                                            pointer(workspace), pointer(key_sums)};
    const bool bf16 = q.scalar_type() == at::kBFloat16;
    at_npu::native::OpCommand::RunOpApiV2("skiparse_attention_bwd", [=]() -> int {
        return skiparse_attention_bwd(stream.stream(false), &cores, &b, bf16, &pointers, &scratch);
    });
    return {grad_q, grad_k, grad_v, grad_text_q, grad_text_k, grad_text_v};
}

}  // namespace

TORCH_LIBRARY(skiparse_ascend, m) {
    m.def(
        "attention(Tensor q, Tensor k, Tensor v, Tensor text_q, Tensor text_k, Tensor text_v, "
        "Tensor? mask, Tensor? text_mask, int sparsity, int run, float scale, bool half_scores) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "attention_backward(Tensor grad_out, Tensor grad_text_out, Tensor q, Tensor k, Tensor v, "
        "Tensor text_q, Tensor text_k, Tensor text_v, Tensor? mask, Tensor? text_mask, Tensor out, "
        "Tensor text_out, Tensor lse, Tensor text_lse, int sparsity, int run, float scale) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(skiparse_ascend, PrivateUse1, m) {
    m.impl("attention", attention);
    m.impl("attention_backward", attention_backward);
}
