// The 16-bit floating-point types of the accelerator, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace twin {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// `bits` shifted right, rounded to nearest, ties to even.
inline uint32_t shift_rounded(uint32_t bits, int by) {
    const uint32_t half = 1u << (by - 1);
    const uint32_t kept = bits >> by, lost = bits & ((1u << by) - 1);
    return kept + (lost > half || (lost == half && (kept & 1)));
}

}  // namespace twin

struct bfloat16_t {
    uint16_t bits;

    static bfloat16_t round(float x) {
        const uint32_t wide = twin::bits_of(x);
        const bool nan = (wide & 0x7fffffff) > 0x7f800000;
        return {static_cast<uint16_t>(nan ? wide >> 16 | 0x40 : twin::shift_rounded(wide, 16))};
    }
    explicit operator float() const { return twin::float_of(static_cast<uint32_t>(bits) << 16); }
};

struct half {
    uint16_t bits;

    static half round(float x) {
        const uint32_t wide = twin::bits_of(x), sign = wide >> 16 & 0x8000;
        const uint32_t size = wide & 0x7fffffff;
        uint32_t bits;
        if (size > 0x7f800000) {
            bits = 0x7e00;  // not a number
        } else if (size >= 0x477ff000) {
            bits = 0x7c00;  // 65520 and more round to infinity
        } else if (size >= 0x38800000) {
            bits = twin::shift_rounded(size - 0x38000000, 13);
        } else {  // subnormal: the exponent says how far to shift
            const int shift = 126 - static_cast<int>(size >> 23);
            bits = shift > 24 ? 0 : twin::shift_rounded((size & 0x7fffff) | 0x800000, shift);
        }
        return {static_cast<uint16_t>(sign | bits)};
    }
    explicit operator float() const {
        const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31;
        const uint32_t fraction = bits & 0x3ff;
        if (exponent == 31) return twin::float_of(sign | 0x7f800000 | fraction << 13);
        if (exponent != 0) return twin::float_of(sign | (exponent + 112) << 23 | fraction << 13);
        const float small = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -small : small;
    }
};

namespace twin {

template <class T>
T rounded(float x) {
    return T::round(x);
}
template <>
inline float rounded<float>(float x) {
    return x;
}

}  // namespace twin
