// What is added to the score of every key: 0, or HIDDEN where a mask or the end of the keys is.
//
// Vector cores alone. Output: fp32 [batch, sparsity, stacks * STACK_KEYS], in the order in which
// the attention kernels visit the keys: video of the sub-sequence, then text, then nothing.
#include "kernel_operator.h"

#include "rows.h"

namespace skiparse {

using namespace AscendC;

class KeyBias {
public:
    // Masks are bytes [batch, tokens] and [batch, text], nonzero: attend; or null.
    __aicore__ __inline__ KeyBias(const Tiling& tiling, GM_ADDR mask, GM_ADDR text_mask)
        : t_(tiling), mask_(At<uint8_t>(mask, 0)), text_mask_(At<uint8_t>(text_mask, 0)),
          masked_(mask != nullptr), text_masked_(text_mask != nullptr) {
        LocalMemAllocator<Hardware::UB> ub;
        row_ = ub.Alloc<TPosition::VECCALC, float>(STACK_KEYS);
    }

    __aicore__ __inline__ void Run(GM_ADDR bias, int64_t core, int64_t cores) {
        const int64_t stacks = most_stacks(t_);
        SetFlag<HardEvent::MTE3_V>(0);
        for (int64_t i = core; i < t_.batch * t_.sparsity * stacks; i += cores) {
            const int64_t sub = i / stacks % t_.sparsity, batch = i / stacks / t_.sparsity;
            WaitFlag<HardEvent::MTE3_V>(0);
            OfStack(batch, sub, i % stacks * STACK_KEYS);
            SetFlag<HardEvent::V_MTE3>(0);
            WaitFlag<HardEvent::V_MTE3>(0);
            DataCopy(At<float>(bias, i * STACK_KEYS), row_, STACK_KEYS);
            SetFlag<HardEvent::MTE3_V>(0);
        }
        WaitFlag<HardEvent::MTE3_V>(0);
    }

private:
    // All keys are seen and the places after them hidden, by whole rows; then those that a mask
    // hides, one by one.
    __aicore__ __inline__ void OfStack(int64_t batch, int64_t sub, int64_t first) {
        const int64_t length = length_of(t_, sub);
        const int64_t keys = least(length + t_.text - first, STACK_KEYS);
        Duplicate(row_, HIDDEN, STACK_KEYS);
        PipeBarrier<PIPE_V>();
        if (keys > 0) Duplicate(row_, 0.0f, keys);
        if (!masked_ && !text_masked_) return;
        SetFlag<HardEvent::V_S>(0);
        WaitFlag<HardEvent::V_S>(0);
        const int64_t of_video = VideoCount(length, first, keys);
        if (masked_) HideVideo(batch, sub, first, of_video);
        if (text_masked_) HideText(batch, length, first, of_video, keys);
        SetFlag<HardEvent::S_MTE3>(0);
        WaitFlag<HardEvent::S_MTE3>(0);
    }

    __aicore__ __inline__ void HideVideo(int64_t batch, int64_t sub, int64_t first,
                                         int64_t count) {
        const Deal deal = deal_of(sub, t_.sparsity, t_.run);
        for (int64_t j = 0; j < count;) {
            const Runs runs = runs_at(deal, first + j, first + count);
            for (int64_t run = 0; run < runs.runs; ++run) {
                const int64_t token = batch * t_.tokens + runs.token + run * runs.apart;
                for (int64_t i = 0; i < runs.length; ++i, ++j) {
                    if (mask_.GetValue(token + i) == 0) row_.SetValue(j, HIDDEN);
                }
            }
        }
    }

    __aicore__ __inline__ void HideText(int64_t batch, int64_t length, int64_t first,
                                        int64_t from, int64_t to) {
        const int64_t token = batch * t_.text + first - length;
        for (int64_t j = from; j < to; ++j) {
            if (text_mask_.GetValue(token + j) == 0) row_.SetValue(j, HIDDEN);
        }
    }

    const Tiling& t_;
    GlobalTensor<uint8_t> mask_, text_mask_;
    bool masked_, text_masked_;
    LocalTensor<float> row_;  // [STACK_KEYS]
};

}  // namespace skiparse

extern "C" __global__ __vector__ void skiparse_key_bias(GM_ADDR mask, GM_ADDR text_mask,
                                                        GM_ADDR bias, skiparse::Tiling tiling) {
    AscendC::InitSocState();
    skiparse::KeyBias(tiling, mask, text_mask)
        .Run(bias, AscendC::GetBlockIdx(), AscendC::GetBlockNum());
    AscendC::PipeBarrier<PIPE_ALL>();
}
