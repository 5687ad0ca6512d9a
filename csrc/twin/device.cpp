// The C interface of csrc/host/launch.h on the twin: what is built for a device, run on a CPU. It
// stands in for libskiparse_ascend.so in a test.
#include "run.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

[[noreturn]] void fail(const char* report) {
    std::fprintf(stderr, "%s\n", report);
    std::abort();
}

template <class Pass>
void run(const Pass& pass) {
    twin::Machine machine;
    try {
        pass(machine, table().kernels[0]);
    } catch (const twin::Fault& fault) {
        fail(fault.what());
    }
}

// The caller lends as much memory as was asked for.
void fill(void* memory, int64_t bytes) {
    if (bytes > 0) std::memset(memory, 0xcd, bytes);
}

}  // namespace

extern "C" int skiparse_ascend_cores(void*, SkiparseCores* cores) {
    *cores = {2, 4};
    return 0;
}

extern "C" int skiparse_attention_fwd(void*, const SkiparseCores* cores,
                                      const skiparse::Tiling* tiling, int32_t bf16,
                                      int32_t half_scores,
                                      const skiparse::ForwardPointers* pointers,
                                      const skiparse::ForwardScratch* scratch) {
    fill(scratch->bias, bias_bytes(*tiling));
    fill(scratch->workspace, cores->cube * skiparse::WORKSPACE_BYTES);
    twin::Model model;
    model.half_scores = half_scores;
    run([&](twin::Machine& machine, const Kernels& kernels) {
        twin::forward(machine, kernels, *tiling, bf16, cores->cube, *pointers, model);
    });
    return 0;
}

extern "C" int skiparse_attention_bwd(void*, const SkiparseCores* cores,
                                      const skiparse::BackwardTiling* tiling, int32_t bf16,
                                      const skiparse::BackwardPointers* pointers,
                                      const skiparse::BackwardScratch* scratch) {
    const skiparse::Tiling& t = tiling->forward;
    fill(scratch->bias, bias_bytes(t));
    fill(scratch->values, row_values_bytes(t));
    fill(scratch->text_parts, text_parts_bytes(t));
    fill(scratch->workspace, cores->cube * backward_workspace_bytes(*tiling));
    fill(scratch->key_sums, cores->cube * key_sums_bytes(*tiling));
    run([&](twin::Machine& machine, const Kernels& kernels) {
        twin::backward(machine, kernels, *tiling, bf16, cores->cube, *pointers, twin::Model{});
    });
    return 0;
}
