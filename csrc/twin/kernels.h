// The kernels as they are.
#include "../ascend/attention_fwd.cpp"
#include "../ascend/key_bias.cpp"

constexpr Kernels VARIANTS[] = {
    {skiparse_key_bias, skiparse_attention_fwd_fp16, skiparse_attention_fwd_bf16},
};
