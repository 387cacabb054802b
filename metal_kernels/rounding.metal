// Round trips through FP8 (e4m3) and FP4 (e2m1) with one power-of-two scale per block (spec 6.3), on pairs of values
// held as in row.metal. Must give the bits of the references. Every division here is by a power of two and made as an
// exact product; sizes are compared as integers, which keeps NaN and does not flush denormals. Devices that flush
// them differ only where all values of an FP4 block are below 2^-122.

// The nearest number with so many bits after the leading one, ties to even; below 2^LOWEST the steps stay the same.
template <int MANTISSA, int LOWEST>
inline float to_grid(float y, float largest) {
    const float v = y > largest ? largest : y < -largest ? -largest : y;  // not clamp, which may lose NaN
    const uint exponent = metal::max((as_type<uint>(v) >> 23) & 0xffu, static_cast<uint>(127 + LOWEST));
    const float inverse_step = as_type<float>((254u + MANTISSA - exponent) << 23);
    return metal::rint(v * inverse_step) * as_type<float>((exponent - MANTISSA) << 23);
}

// The biased exponent of s = 2^ceil(log2(amax / largest)); amax is given as the bits of the float. log2 in floating
// point would land on the wrong side of some integers. From 254 on only if the block holds infinity or NaN.
inline uint scale_exponent(uint amax, float inverse_largest) {
    const uint bits = as_type<uint>(as_type<float>(amax) * inverse_largest);
    return (bits >> 23) + ((bits & 0x7fffffu) != 0u ? 1u : 0u);
}

// x / s on the grid
template <int MANTISSA, int LOWEST>
inline float2 on_grid(float2 x, uint exponent, float largest) {
    const float inverse =
        exponent < 254u ? as_type<float>((254u - exponent) << 23) : 1.0f / as_type<float>(exponent << 23);
    return float2(to_grid<MANTISSA, LOWEST>(x.x * inverse, largest), to_grid<MANTISSA, LOWEST>(x.y * inverse, largest));
}

inline uint larger_size(float2 x) {
    return metal::max(as_type<uint>(x.x) & 0x7fffffffu, as_type<uint>(x.y) & 0x7fffffffu);
}

// A block is the 64 values that a simdgroup has in one register each.
inline uint fp8_exponent(float2 x) {
    return scale_exponent(metal::max(simd_max(larger_size(x)), as_type<uint>(1e-4f)), 1.0f / 448.0f);
}

inline float2 to_fp8(float2 x, uint exponent) {
    return on_grid<3, -6>(x, exponent, 448.0f);
}

inline float2 fp8_round_trip(float2 x) {
    const uint exponent = fp8_exponent(x);
    return to_fp8(x, exponent) * as_type<float>(exponent << 23);
}

// A block is the 32 values of 16 lanes.
inline uint fp4_exponent(float2 x) {
    uint amax = metal::max(larger_size(x), 0x01c00000u);  // 6 * 2^-126
    for (ushort apart = 1; apart < 16; apart *= 2) {
        amax = metal::max(amax, simd_shuffle_xor(amax, apart));
    }
    return scale_exponent(amax, 1.0f / 6.0f);
}

inline float2 to_fp4(float2 x, uint exponent) {
    return on_grid<1, 0>(x, exponent, 6.0f);
}

inline float2 fp4_round_trip(float2 x) {
    const uint exponent = fp4_exponent(x);
    return to_fp4(x, exponent) * as_type<float>(exponent << 23);
}
