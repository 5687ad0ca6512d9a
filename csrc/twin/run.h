// Runs the kernels of a pass on the twin: global memory is the caller's.
#pragma once

#include "kernel_operator.h"

#include "../host/passes.h"

// A kernel of so many pointers, and the problem by value.
template <class TILING, int POINTERS, class... Pointers>
struct KernelOf : KernelOf<TILING, POINTERS - 1, GM_ADDR, Pointers...> {};
template <class TILING, class... Pointers>
struct KernelOf<TILING, 0, Pointers...> {
    using Type = void (*)(Pointers..., TILING);
};
template <class TILING, int POINTERS>
using Kernel = typename KernelOf<TILING, POINTERS>::Type;

// The kernels as they are, or an altered copy of them.
struct Kernels {
    Kernel<skiparse::Tiling, 3> key_bias;
    Kernel<skiparse::Tiling, 12> forward_fp16, forward_bf16;

    // Of the backward pass, which altered copies may lack.
    Kernel<skiparse::BackwardTiling, 7> row_values_fp16 = nullptr, row_values_bf16 = nullptr;
    Kernel<skiparse::BackwardTiling, 16> backward_fp16 = nullptr, backward_bf16 = nullptr;
    Kernel<skiparse::Tiling, 4> text_gradients_fp16 = nullptr, text_gradients_bf16 = nullptr;

    // With scores in half, likewise.
    Kernel<skiparse::Tiling, 12> forward_half_scores_fp16 = nullptr;
    Kernel<skiparse::Tiling, 12> forward_half_scores_bf16 = nullptr;

    auto forward(bool bf16, bool half_scores) const {
        if (half_scores) return bf16 ? forward_half_scores_bf16 : forward_half_scores_fp16;
        return bf16 ? forward_bf16 : forward_fp16;
    }
};

// Those that a library was built with: kernels.cpp, or what a test wrote.
struct Table {
    const Kernels* kernels;
    int count;
};
Table table();

namespace twin {

inline size_t bytes_spanned(const skiparse::Tiling& t, const skiparse::Strides& s, int64_t rows) {
    const int64_t count = (t.batch - 1) * s.batch + (rows - 1) * s.token +
                          (t.heads - 1) * s.head + t.head_dim;
    return rows > 0 && t.batch > 0 ? count * sizeof(uint16_t) : 0;
}

// Which kernel to run and how, or what to count alone: neither data nor checks of it, on one of the
// cores.
struct Model {
    int guess = 1;  // a `Guess`
    bool costs_only = false;
    int core = -1;                 // -1: all
    bool last_lane_first = false;  // the order of the sub-cores, which changes nothing
    bool half_scores = false;      // forward
    // Or, unless 0: run on so many cores, the last alone, and only the last of so many equal parts
    // of every buffer is in memory, but for the text. Pointers are those of whole buffers.
    int64_t last_part = 0;
};

// The global memory of a launch. Without data it is addresses alone.
class Global {
public:
    Global(Machine& machine, const Model& model) : machine_(machine) {
        machine.costs.guess = static_cast<Guess>(model.guess);
        machine.costs_only = model.costs_only;
        machine.only_core = model.core;
        machine.last_lane_first = model.last_lane_first;
        if (model.last_part > 0) parts_ = model.last_part;
    }

    GM_ADDR input(const char* name, void* data, size_t bytes) {
        return add(name, data, bytes, true);
    }
    GM_ADDR whole_input(const char* name, void* data, size_t bytes) {
        return add(name, data, bytes, true, 1);
    }
    GM_ADDR output(const char* name, void* data, size_t bytes) {
        outputs_.push_back(machine_.global.size());
        return add(name, data, bytes, false);
    }
    GM_ADDR scratch(const char* name, size_t bytes) {
        const size_t there = bytes / parts_;
        own_.emplace_back(machine_.costs_only ? 0 : there, 0xcd);
        GM_ADDR address = add(name, own_.back().data() - (bytes - there), bytes, false);
        machine_.global.back().scratch = true;
        return address;
    }
    void expect_outputs_written() const {
        for (size_t i : outputs_) {
            const Memory& output = machine_.global[i];
            if (!machine_.costs_only && output.bytes > 0 && !output.filled(0, output.bytes)) {
                throw Fault("the kernel leaves a part of " + output.name + " unwritten");
            }
        }
    }

private:
    GM_ADDR add(const char* name, void* data, size_t bytes, bool input) {
        return add(name, data, bytes, input, parts_);
    }
    GM_ADDR add(const char* name, void* data, size_t bytes, bool input, size_t parts) {
        if (machine_.costs_only) {
            auto* address = reinterpret_cast<uint8_t*>(next_);
            next_ += APART;
            machine_.global.emplace_back(name, address, bytes);
            return address;
        }
        auto* address = static_cast<uint8_t*>(data);
        const size_t there = bytes / parts;
        machine_.global.emplace_back(name, address + (bytes - there), there, GLOBAL_CELL,
                                     input, !input);
        return address;
    }

    // Between buffers without data, so that a wrong offset does not lead into another.
    static constexpr size_t APART = size_t{1} << 42;
    Machine& machine_;
    std::vector<size_t> outputs_;
    std::deque<std::vector<uint8_t>> own_;
    size_t parts_ = 1;
    uintptr_t next_ = APART;
};

// Launches each kernel on all cores of the machine.
struct Launcher {
    Machine& machine;
    const Kernels& kernels;
    int cores;
    bool half_scores = false;

    template <class... Pointers>
    void key_bias(const skiparse::Tiling& t, Pointers... p) const {
        launch(false, kernels.key_bias, t, p...);
    }
    template <class... Pointers>
    void forward(const skiparse::Tiling& t, bool bf16, Pointers... p) const {
        launch(true, kernels.forward(bf16, half_scores), t, p...);
    }
    template <class... Pointers>
    void row_values(const skiparse::BackwardTiling& t, bool bf16, Pointers... p) const {
        launch(false, bf16 ? kernels.row_values_bf16 : kernels.row_values_fp16, t, p...);
    }
    template <class... Pointers>
    void backward(const skiparse::BackwardTiling& t, bool bf16, Pointers... p) const {
        launch(true, bf16 ? kernels.backward_bf16 : kernels.backward_fp16, t, p...);
    }
    template <class... Pointers>
    void text_gradients(const skiparse::Tiling& t, bool bf16, Pointers... p) const {
        launch(false, bf16 ? kernels.text_gradients_bf16 : kernels.text_gradients_fp16, t, p...);
    }

private:
    template <class Kernel, class TILING, class... Pointers>
    void launch(bool cube, Kernel kernel, const TILING& t, Pointers... p) const {
        twin::launch(machine, cores, cube, [&] { kernel(static_cast<GM_ADDR>(p)..., t); });
    }
};

inline void forward(Machine& machine, const Kernels& kernels, skiparse::Tiling t, bool bf16,
                    int cores, const skiparse::ForwardPointers& p, const Model& model) {
    Global global(machine, model);
    const int64_t rows = t.batch * t.tokens * t.heads;
    const int64_t text_rows = t.batch * t.sparsity * t.text * t.heads;
    const size_t video_mask = p.mask ? t.batch * t.tokens : 0;
    const size_t text_mask = p.text_mask ? t.batch * t.text : 0;

    GM_ADDR q = global.input("q", p.q, bytes_spanned(t, t.q, t.tokens));
    GM_ADDR k = global.input("k", p.k, bytes_spanned(t, t.k, t.tokens));
    GM_ADDR v = global.input("v", p.v, bytes_spanned(t, t.v, t.tokens));
    GM_ADDR text_q = global.whole_input("text_q", p.text_q, bytes_spanned(t, t.text_q, t.text));
    GM_ADDR text_k = global.whole_input("text_k", p.text_k, bytes_spanned(t, t.text_k, t.text));
    GM_ADDR text_v = global.whole_input("text_v", p.text_v, bytes_spanned(t, t.text_v, t.text));
    GM_ADDR mask = global.input("mask", p.mask, video_mask);
    GM_ADDR text_mask_at = global.input("text_mask", p.text_mask, text_mask);
    GM_ADDR bias = global.scratch("bias", bias_bytes(t));
    GM_ADDR workspace = global.scratch("workspace", cores * skiparse::WORKSPACE_BYTES);
    GM_ADDR out = global.output("out", p.out, rows * t.head_dim * sizeof(uint16_t));
    GM_ADDR text_out =
        global.output("text_out", p.text_out, text_rows * t.head_dim * sizeof(uint16_t));
    GM_ADDR lse = global.output("lse", p.lse, rows * sizeof(float));
    GM_ADDR text_lse = global.output("text_lse", p.text_lse, text_rows * sizeof(float));

    skiparse::run_forward(
        Launcher{machine, kernels, cores, model.half_scores}, t, bf16,
        {q, k, v, text_q, text_k, text_v, p.mask ? mask : nullptr,
         p.text_mask ? text_mask_at : nullptr, out, text_out, lse, text_lse},
        {bias, workspace});
    global.expect_outputs_written();
}

inline void backward(Machine& machine, const Kernels& kernels, skiparse::BackwardTiling b,
                     bool bf16, int cores, const skiparse::BackwardPointers& p, const Model& model) {
    Global global(machine, model);
    const skiparse::Tiling& t = b.forward;
    const int64_t rows = t.batch * t.tokens * t.heads, text_rows = t.batch * t.text * t.heads;
    const size_t row = t.head_dim * sizeof(uint16_t), wide = sizeof(float);
    const size_t video_mask = p.mask ? t.batch * t.tokens : 0;
    const size_t text_mask = p.text_mask ? t.batch * t.text : 0;
    const size_t upstream = bytes_spanned(t, b.grad_out, t.tokens);
    size_t text_upstream = bytes_spanned(t, b.grad_text_out, t.text);
    if (text_upstream > 0) text_upstream += (t.sparsity - 1) * b.grad_text_sub * sizeof(uint16_t);

    GM_ADDR q = global.input("q", p.q, bytes_spanned(t, t.q, t.tokens));
    GM_ADDR k = global.input("k", p.k, bytes_spanned(t, t.k, t.tokens));
    GM_ADDR v = global.input("v", p.v, bytes_spanned(t, t.v, t.tokens));
    GM_ADDR text_q = global.whole_input("text_q", p.text_q, bytes_spanned(t, t.text_q, t.text));
    GM_ADDR text_k = global.whole_input("text_k", p.text_k, bytes_spanned(t, t.text_k, t.text));
    GM_ADDR text_v = global.whole_input("text_v", p.text_v, bytes_spanned(t, t.text_v, t.text));
    GM_ADDR mask = global.input("mask", p.mask, video_mask);
    GM_ADDR text_mask_at = global.input("text_mask", p.text_mask, text_mask);
    GM_ADDR out = global.input("out", p.out, rows * row);
    GM_ADDR text_out = global.input("text_out", p.text_out, text_rows * t.sparsity * row);
    GM_ADDR lse = global.input("lse", p.lse, rows * wide);
    GM_ADDR text_lse = global.input("text_lse", p.text_lse, text_rows * t.sparsity * wide);
    GM_ADDR grad_out = global.input("grad_out", p.grad_out, upstream);
    GM_ADDR grad_text_out = global.input("grad_text_out", p.grad_text_out, text_upstream);
    GM_ADDR bias = global.scratch("bias", bias_bytes(t));
    GM_ADDR values = global.scratch("row values", row_values_bytes(t));
    GM_ADDR parts = global.scratch("text parts", text_parts_bytes(t));
    GM_ADDR workspace = global.scratch("workspace", cores * backward_workspace_bytes(b));
    GM_ADDR key_sums = global.scratch("key sums", cores * key_sums_bytes(b));
    GM_ADDR grad_q = global.output("grad_q", p.grad_q, rows * row);
    GM_ADDR grad_k = global.output("grad_k", p.grad_k, rows * row);
    GM_ADDR grad_v = global.output("grad_v", p.grad_v, rows * row);
    GM_ADDR grad_text_q = global.output("grad_text_q", p.grad_text_q, text_rows * row);
    GM_ADDR grad_text_k = global.output("grad_text_k", p.grad_text_k, text_rows * row);
    GM_ADDR grad_text_v = global.output("grad_text_v", p.grad_text_v, text_rows * row);

    skiparse::run_backward(
        Launcher{machine, kernels, cores}, b, bf16,
        {q, k, v, text_q, text_k, text_v, p.mask ? mask : nullptr,
         p.text_mask ? text_mask_at : nullptr, out, text_out, lse, text_lse, grad_out,
         grad_text_out, grad_q, grad_k, grad_v, grad_text_q, grad_text_k, grad_text_v},
        {bias, values, parts, workspace, key_sums});
    global.expect_outputs_written();
}

}  // namespace twin
