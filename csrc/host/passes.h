// The kernels of a pass, in order, with their arguments: the same for the device and the twin.
//
// A `Run` has a function for each kernel that launches it on all cores, after those before.
#pragma once

#include "launch.h"

namespace skiparse {

template <class Run>
void run_forward(const Run& run, const Tiling& t, bool bf16, const ForwardPointers& p,
                 const ForwardScratch& s) {
    run.key_bias(t, p.mask, p.text_mask, s.bias);
    run.forward(t, bf16, p.q, p.k, p.v, p.text_q, p.text_k, p.text_v, s.bias, p.out, p.text_out, p.lse,
                p.text_lse, s.workspace);
}

template <class Run>
void run_backward(const Run& run, const BackwardTiling& b, bool bf16, const BackwardPointers& p,
                  const BackwardScratch& s) {
    run.key_bias(b.forward, p.mask, p.text_mask, s.bias);
    run.row_values(b, bf16, p.out, p.text_out, p.lse, p.text_lse, p.grad_out, p.grad_text_out,
                   s.values);
    run.backward(b, bf16, p.q, p.k, p.v, p.text_q, p.text_k, p.text_v, p.grad_out, p.grad_text_out,
                 s.bias, s.values, p.grad_q, p.grad_k, p.grad_v, s.text_parts, s.workspace,
                 s.key_sums);
    run.text_gradients(b.forward, bf16, s.text_parts, p.grad_text_q, p.grad_text_k,
                       p.grad_text_v);
}

}  // namespace skiparse
