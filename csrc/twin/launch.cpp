// The kernels on the twin, behind C functions: global memory is the caller's.
//
// KERNELS names the file that holds them; the tests give one with altered copies. It must define
// VARIANTS, an array of `Kernels`.
#include "kernel_operator.h"

#include <cstdio>

#include "../ascend/tiling.h"

struct Kernels {
    void (*key_bias)(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR);
    void (*forward_fp16)(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR,
                         GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR);
    decltype(forward_fp16) forward_bf16;
};

#include KERNELS

namespace {

// Pointers may be null where the tensor is empty. Inputs have any strides, outputs are contiguous.
struct ForwardPointers {
    void *q, *k, *v, *text_q, *text_k, *text_v;
    void *mask, *text_mask;  // bytes, or null
    void *out, *text_out, *lse, *text_lse;
};

size_t bytes_spanned(const skiparse::Tiling& t, const skiparse::Strides& s, int64_t rows) {
    const int64_t count = (t.batch - 1) * s.batch + (rows - 1) * s.token +
                          (t.heads - 1) * s.head + t.head_dim;
    return rows > 0 && t.batch > 0 ? count * sizeof(uint16_t) : 0;
}

void add(twin::Machine& machine, const char* name, void* data, size_t bytes, bool output) {
    machine.global.emplace_back(name, static_cast<uint8_t*>(data), bytes, twin::GLOBAL_CELL,
                                !output, output);
}

void run_forward(const Kernels& kernels, const skiparse::Tiling& t, bool bf16, int cores,
                 const ForwardPointers& p) {
    twin::Machine machine;
    const int64_t rows = t.batch * t.tokens * t.heads;
    const int64_t text_rows = t.batch * t.sparsity * t.text * t.heads;
    std::vector<float> bias(t.batch * t.sparsity * most_stacks(t) * skiparse::STACK_KEYS);
    std::vector<uint8_t> workspace(cores * skiparse::WORKSPACE_BYTES, 0xcd);
    add(machine, "q", p.q, bytes_spanned(t, t.q, t.tokens), false);
    add(machine, "k", p.k, bytes_spanned(t, t.k, t.tokens), false);
    add(machine, "v", p.v, bytes_spanned(t, t.v, t.tokens), false);
    add(machine, "text_q", p.text_q, bytes_spanned(t, t.text_q, t.text), false);
    add(machine, "text_k", p.text_k, bytes_spanned(t, t.text_k, t.text), false);
    add(machine, "text_v", p.text_v, bytes_spanned(t, t.text_v, t.text), false);
    add(machine, "mask", p.mask, p.mask ? t.batch * t.tokens : 0, false);
    add(machine, "text_mask", p.text_mask, p.text_mask ? t.batch * t.text : 0, false);
    add(machine, "bias", bias.data(), bias.size() * sizeof(float), true);
    add(machine, "workspace", workspace.data(), workspace.size(), true);
    const size_t first_output = machine.global.size();
    add(machine, "out", p.out, rows * t.head_dim * sizeof(uint16_t), true);
    add(machine, "text_out", p.text_out, text_rows * t.head_dim * sizeof(uint16_t), true);
    add(machine, "lse", p.lse, rows * sizeof(float), true);
    add(machine, "text_lse", p.text_lse, text_rows * sizeof(float), true);

    auto gm = [](const void* pointer) {
        return const_cast<uint8_t*>(static_cast<const uint8_t*>(pointer));
    };
    twin::launch(machine, cores, false, [&] {
        kernels.key_bias(gm(p.mask), gm(p.text_mask), gm(bias.data()), gm(&t));
    });
    const auto kernel = bf16 ? kernels.forward_bf16 : kernels.forward_fp16;
    twin::launch(machine, cores, true, [&] {
        kernel(gm(p.q), gm(p.k), gm(p.v), gm(p.text_q), gm(p.text_k), gm(p.text_v),
               gm(bias.data()), gm(p.out), gm(p.text_out), gm(p.lse), gm(p.text_lse),
               workspace.data(), gm(&t));
    });
    for (size_t i = first_output; i < machine.global.size(); ++i) {
        const twin::Memory& output = machine.global[i];
        if (output.bytes > 0 && !output.filled(0, output.bytes)) {
            throw twin::Fault("the kernel leaves a part of " + output.name + " unwritten");
        }
    }
}

}  // namespace

// 0, or 1 with the fault in `report`.
extern "C" int skiparse_twin_forward(int variant, const skiparse::Tiling* tiling, int bf16,
                                     int cores, const ForwardPointers* pointers, char* report,
                                     size_t size) {
    try {
        run_forward(VARIANTS[variant], *tiling, bf16, cores, *pointers);
        return 0;
    } catch (const twin::Fault& fault) {
        std::snprintf(report, size, "%s", fault.what());
        return 1;
    }
}
