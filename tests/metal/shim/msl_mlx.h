// Intrinsics of Apple's compiler that MLX's own headers call, and the logging they declare.
#pragma once

namespace metal {
struct os_log {
    constexpr os_log(const __MSL_CONSTANT_SPACE char*, const __MSL_CONSTANT_SPACE char*) __MSL_CONSTANT_SPACE {}
    template <class... A> void log(const __MSL_CONSTANT_SPACE char*, A...) const __MSL_CONSTANT_SPACE {}
    template <class... A> void log_debug(const __MSL_CONSTANT_SPACE char*, A...) const __MSL_CONSTANT_SPACE {}
    template <class... A> void log_info(const __MSL_CONSTANT_SPACE char*, A...) const __MSL_CONSTANT_SPACE {}
};

#define M(f) __MSL_INLINE float __metal_##f(float x, bool) { return f(x); }
M(fabs) M(acos) M(acosh) M(asin) M(asinh) M(atan) M(atanh) M(ceil) M(cos) M(cosh) M(cospi) M(exp) M(exp2) M(exp10)
M(floor) M(fract) M(log) M(log2) M(log10) M(rint) M(round) M(rsqrt) M(sin) M(sinh) M(sinpi) M(sqrt) M(tan) M(tanh)
M(tanpi) M(trunc)
#undef M
#define M(f)                                                                         \
    __MSL_INLINE float __metal_##f(float x, float y) { return f(x, y); }             \
    __MSL_INLINE float __metal_##f(float x, float y, bool) { return f(x, y); }
M(atan2) M(fmod) M(pow) M(powr) M(nextafter) M(divide) M(fmax) M(fmin) M(fdim)
#undef M
#define M(f)                                                                                \
    __MSL_INLINE float __metal_##f(float x, float y, float z) { return f(x, y, z); }        \
    __MSL_INLINE float __metal_##f(float x, float y, float z, bool) { return f(x, y, z); }
M(fma) M(fmax3) M(fmin3) M(fmedian3)
#undef M
__MSL_INLINE float __metal_ldexp(float x, int e, bool) { return ldexp(x, e); }
__MSL_INLINE float __metal_frexp(float x, thread int* e) { return frexpf(x, e); }
__MSL_INLINE int __metal_ilogb(float x, bool) { return ilogb(x); }
__MSL_INLINE bool __metal_isnan(float x, bool) { return isnan(x); }
__MSL_INLINE bool __metal_isinf(float x, bool) { return isinf(x); }
__MSL_INLINE bool __metal_isfinite(float x, bool) { return isfinite(x); }

__MSL_INLINE ushort __metal_get_simdgroup_size(ushort) { return 32; }
__MSL_INLINE ushort __metal_get_thread_index_in_simdgroup(ushort) { return __msl_lane(); }
#define M(f) template <class T> __MSL_INLINE T __metal_##f(T x, __MSL_LINE) { return f(x, __line); }
M(simd_max) M(simd_min) M(simd_sum) M(simd_product) M(simd_prefix_exclusive_product) M(simd_prefix_exclusive_sum)
M(simd_prefix_inclusive_product) M(simd_prefix_inclusive_sum)
#undef M
#define M(f) template <class T> __MSL_INLINE T __metal_##f(T x, ushort d, __MSL_LINE) { return f(x, d, __line); }
M(simd_broadcast) M(simd_shuffle) M(simd_shuffle_down) M(simd_shuffle_up) M(simd_shuffle_xor)
M(simd_shuffle_rotate_down) M(simd_shuffle_rotate_up)
#undef M
__MSL_INLINE float __metal_simd_xor(float x, __MSL_LINE) { return as_type<float>(simd_xor(as_type<uint>(x), __line)); }
__MSL_INLINE ushort __metal_simd_shuffle_and_fill_up(ushort x, ushort f, ushort d, ushort = 32, __MSL_LINE) {
    return simd_shuffle_and_fill_up(x, f, d, __line);
}
__MSL_INLINE ushort __metal_simd_shuffle_and_fill_down(ushort x, ushort f, ushort d, ushort = 32, __MSL_LINE) {
    return simd_shuffle_and_fill_down(x, f, d, __line);
}
}  // namespace metal
using metal::__metal_get_thread_index_in_simdgroup;
