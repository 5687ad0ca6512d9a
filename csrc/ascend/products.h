// Matrix products of the cube core: from L1 through L0A and L0B into L0C, and from there to global
// memory.
#pragma once

#include "rows.h"

namespace skiparse {

__aicore__ __inline__ int64_t RoundUp(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }

// Two slots in each of L0A, L0B and L0C, so that loads, products and copies run side by side. An
// operand is loaded, used by any number of products, and given back; the next goes to the other
// slot. Which slot of L0C a product is added to is the caller's choice.
template <class T>
class Products {
    using HardEvent = AscendC::HardEvent;
    template <class U>
    using LocalTensor = AscendC::LocalTensor<U>;

public:
    __aicore__ __inline__ void Init() {
        AscendC::LocalMemAllocator<AscendC::Hardware::L0A> l0a;
        AscendC::LocalMemAllocator<AscendC::Hardware::L0B> l0b;
        AscendC::LocalMemAllocator<AscendC::Hardware::L0C> l0c;
        left_ = l0a.Alloc<AscendC::TPosition::A2, T>(2 * SLOT);
        right_ = l0b.Alloc<AscendC::TPosition::B2, T>(2 * SLOT);
        product_ = l0c.Alloc<AscendC::TPosition::CO1, float>(2 * SLOT);
    }

    // Before the first product.
    __aicore__ __inline__ void Open() {
        for (int32_t slot = 0; slot < 2; ++slot) {
            AscendC::SetFlag<HardEvent::M_MTE1>(LEFT + slot);
            AscendC::SetFlag<HardEvent::M_MTE1>(RIGHT + slot);
            AscendC::SetFlag<HardEvent::FIX_M>(slot);
        }
    }

    // After the last.
    __aicore__ __inline__ void Close() {
        for (int32_t slot = 0; slot < 2; ++slot) {
            AscendC::WaitFlag<HardEvent::M_MTE1>(LEFT + slot);
            AscendC::WaitFlag<HardEvent::M_MTE1>(RIGHT + slot);
            AscendC::WaitFlag<HardEvent::FIX_M>(slot);
        }
    }

    // L0A = `rows` rows and `columns` columns of a matrix of `pitch` rows: NZ to ZZ, 16 rows at a
    // time.
    __aicore__ __inline__ void LoadLeft(const LocalTensor<T>& from, int64_t pitch, int64_t row,
                                        int64_t rows, int64_t column, int64_t columns) {
        const LocalTensor<T> to = TakeLeft();
        AscendC::LoadData2DParams p;
        p.repeatTimes = columns / 16;
        p.srcStride = pitch / 16;
        for (int64_t i = 0; i < rows; i += 16) {
            p.startIndex = (column * pitch / 16 + row + i) / 16;
            AscendC::LoadData(to[i * columns], from, p);
        }
        LeftLoaded();
    }

    // L0A = the transpose of some columns of a matrix of `rows` rows: every fractal transposed, in
    // the order in which they lie there.
    __aicore__ __inline__ void LoadTransposedLeft(const LocalTensor<T>& from, int64_t rows,
                                                  int64_t column, int64_t columns) {
        const LocalTensor<T> to = TakeLeft();
        AscendC::LoadData2DParams p;
        p.startIndex = rows * column / 256;
        p.repeatTimes = rows * columns / 256;
        p.srcStride = 1;
        p.ifTranspose = true;
        AscendC::LoadData(to, from, p);
        LeftLoaded();
    }

    // L0B = the transpose of a matrix: its NZ is the ZN of the transpose.
    __aicore__ __inline__ void LoadTransposedRight(const LocalTensor<T>& from, int64_t rows,
                                                   int64_t columns) {
        const LocalTensor<T> to = TakeRight();
        AscendC::LoadData2DParams p;
        p.repeatTimes = rows * columns / 256;
        p.srcStride = 1;
        AscendC::LoadData(to, from, p);
        RightLoaded();
    }

    // L0B = a matrix: NZ to ZN, every fractal transposed, 16 rows at a time.
    __aicore__ __inline__ void LoadRight(const LocalTensor<T>& from, int64_t rows,
                                         int64_t columns) {
        const LocalTensor<T> to = TakeRight();
        AscendC::LoadData2DParams p;
        p.repeatTimes = columns / 16;
        p.srcStride = rows / 16;
        p.ifTranspose = true;
        for (int64_t row = 0; row < rows; row += 16) {
            p.startIndex = row / 16;
            AscendC::LoadData(to[row * columns], from, p);
        }
        RightLoaded();
    }

    __aicore__ __inline__ void GiveLeft() {
        AscendC::SetFlag<HardEvent::M_MTE1>(LEFT + left_slot_);
    }
    __aicore__ __inline__ void GiveRight() {
        AscendC::SetFlag<HardEvent::M_MTE1>(RIGHT + right_slot_);
    }

    // L0C[slot] (+)= L0A L0B
    __aicore__ __inline__ void Multiply(int32_t slot, int64_t rows, int64_t n, int64_t k,
                                        bool from_zero) {
        AscendC::MmadParams p;
        p.m = RoundUp(rows, 16);
        p.n = n;
        p.k = k;
        p.cmatrixInitVal = from_zero;
        if (from_zero) AscendC::WaitFlag<HardEvent::FIX_M>(slot);
        // Long products are written by the time the next one adds to them.
        if (!from_zero && p.m / 16 * (p.n / 16) < 10) AscendC::PipeBarrier<PIPE_M>();
        AscendC::Mmad(product_[slot * SLOT], left_[left_slot_ * SLOT], right_[right_slot_ * SLOT],
                      p);
    }

    // As fp32, or rounded to half.
    template <class U>
    __aicore__ __inline__ void Write(const AscendC::GlobalTensor<U>& to, int32_t slot, int64_t rows,
                                     int64_t n, int64_t row_stride) {
        AscendC::FixpipeParamsV220 p;
        p.nSize = n;
        p.mSize = rows;
        p.srcStride = RoundUp(rows, 16);
        p.dstStride = row_stride;
        if constexpr (sizeof(U) == sizeof(half)) p.quantPre = QuantMode_t::F322F16;
        AscendC::SetFlag<HardEvent::M_FIX>(slot);
        AscendC::WaitFlag<HardEvent::M_FIX>(slot);
        AscendC::Fixpipe<U, float, AscendC::CFG_ROW_MAJOR>(to, product_[slot * SLOT], p);
        AscendC::SetFlag<HardEvent::FIX_M>(slot);
    }

private:
    static constexpr int64_t SLOT = 128 * 128;     // elements
    static constexpr int32_t LEFT = 0, RIGHT = 2;  // flags of two slots each

    __aicore__ __inline__ LocalTensor<T> TakeLeft() {
        left_slot_ = 1 - left_slot_;
        AscendC::WaitFlag<HardEvent::M_MTE1>(LEFT + left_slot_);
        return left_[left_slot_ * SLOT];
    }
    __aicore__ __inline__ LocalTensor<T> TakeRight() {
        right_slot_ = 1 - right_slot_;
        AscendC::WaitFlag<HardEvent::M_MTE1>(RIGHT + right_slot_);
        return right_[right_slot_ * SLOT];
    }
    __aicore__ __inline__ void LeftLoaded() {
        AscendC::SetFlag<HardEvent::MTE1_M>(LEFT + left_slot_);
        AscendC::WaitFlag<HardEvent::MTE1_M>(LEFT + left_slot_);
    }
    __aicore__ __inline__ void RightLoaded() {
        AscendC::SetFlag<HardEvent::MTE1_M>(RIGHT + right_slot_);
        AscendC::WaitFlag<HardEvent::MTE1_M>(RIGHT + right_slot_);
    }

    LocalTensor<T> left_, right_;
    LocalTensor<float> product_;
    int32_t left_slot_ = 1, right_slot_ = 1;  // the last to be loaded
};

}  // namespace skiparse
