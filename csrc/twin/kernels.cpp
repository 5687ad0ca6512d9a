// The kernels as they are.
#include "run.h"

#include "../ascend/attention_bwd.cpp"
#include "../ascend/attention_fwd.cpp"
#include "../ascend/key_bias.cpp"
#include "../ascend/row_values.cpp"
#include "../ascend/text_gradients.cpp"

constexpr Kernels VARIANTS[] = {
    {skiparse_key_bias, skiparse_attention_fwd_fp16, skiparse_attention_fwd_bf16,
     skiparse_row_values_fp16, skiparse_row_values_bf16, skiparse_attention_bwd_fp16,
     skiparse_attention_bwd_bf16, skiparse_text_gradients_fp16, skiparse_text_gradients_bf16,
     skiparse_attention_fwd_fp16_half_scores, skiparse_attention_fwd_bf16_half_scores},
};

Table table() { return {VARIANTS, std::size(VARIANTS)}; }
