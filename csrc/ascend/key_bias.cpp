// What is added to the score of every key: 0, or HIDDEN where a mask or the end of the keys is.
//
// Vector cores alone. Output: fp32 [batch, sparsity, stacks * STACK_KEYS], in the order in which
// the attention kernels visit the keys: video of the sub-sequence, then text, then nothing.
#include "kernel_operator.h"

#include "rows.h"

namespace skiparse {

using namespace AscendC;

struct Masks {
    GlobalTensor<uint8_t> video, text;  // [batch, tokens], [batch, text]; nonzero: attend
    bool has_video, has_text;
};

__aicore__ inline float BiasOf(const Tiling& t, const Masks& masks, int64_t batch, int64_t sub,
                               int64_t key) {
    const int64_t length = length_of(t, sub);
    if (key < length) {
        const int64_t token = token_of(sub, key, t.sparsity, t.run);
        const bool seen = !masks.has_video || masks.video.GetValue(batch * t.tokens + token) != 0;
        return seen ? 0.0f : HIDDEN;
    }
    const int64_t token = key - length;
    if (token >= t.text) return HIDDEN;
    const bool seen = !masks.has_text || masks.text.GetValue(batch * t.text + token) != 0;
    return seen ? 0.0f : HIDDEN;
}

}  // namespace skiparse

extern "C" __global__ __aicore__ void skiparse_key_bias(GM_ADDR mask, GM_ADDR text_mask,
                                                        GM_ADDR bias, GM_ADDR tiling_address) {
    using namespace skiparse;
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    Tiling t;
    ReadTiling(t, tiling_address);
    const Masks masks{At<uint8_t>(mask, 0), At<uint8_t>(text_mask, 0), mask != nullptr,
                      text_mask != nullptr};
    TPipe pipe;
    TBuf<TPosition::VECCALC> buffer;
    pipe.InitBuffer(buffer, STACK_KEYS * sizeof(float));
    const LocalTensor<float> row = buffer.Get<float>();

    const int64_t stacks = most_stacks(t);
    SetFlag<HardEvent::MTE3_S>(0);
    for (int64_t i = GetBlockIdx(); i < t.batch * t.sparsity * stacks; i += GetBlockNum()) {
        const int64_t sub = i / stacks % t.sparsity, batch = i / stacks / t.sparsity;
        WaitFlag<HardEvent::MTE3_S>(0);
        for (int64_t key = 0; key < STACK_KEYS; ++key) {
            row.SetValue(key, BiasOf(t, masks, batch, sub, i % stacks * STACK_KEYS + key));
        }
        SetFlag<HardEvent::S_MTE3>(0);
        WaitFlag<HardEvent::S_MTE3>(0);
        DataCopy(At<float>(bias, i * STACK_KEYS), row, STACK_KEYS);
        SetFlag<HardEvent::MTE3_S>(0);
    }
    WaitFlag<HardEvent::MTE3_S>(0);
}
