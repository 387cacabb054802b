// Mathematical, integer and relational functions.
//
// Every function is a set of concrete overloads, as in Metal, so that the same calls are ambiguous (`min(int, uint)`,
// `exp(2)`). They are declared in namespace metal and not pulled in by a using-directive: MLX's overloads for bfloat
// live there too, and would hide them.
#pragma once

namespace metal {
#define EACH1(name, T)                                                                          \
    __MSL_INLINE T##2 name(T##2 x) { return T##2{name(x.x), name(x.y)}; }                       \
    __MSL_INLINE T##3 name(T##3 x) { return T##3{name(x.x), name(x.y), name(x.z)}; }            \
    __MSL_INLINE T##4 name(T##4 x) { return T##4{name(x.x), name(x.y), name(x.z), name(x.w)}; }
#define EACH2(name, T)                                                                                           \
    __MSL_INLINE T##2 name(T##2 x, T##2 y) { return T##2{name(x.x, y.x), name(x.y, y.y)}; }                      \
    __MSL_INLINE T##3 name(T##3 x, T##3 y) { return T##3{name(x.x, y.x), name(x.y, y.y), name(x.z, y.z)}; }      \
    __MSL_INLINE T##4 name(T##4 x, T##4 y) {                                                                     \
        return T##4{name(x.x, y.x), name(x.y, y.y), name(x.z, y.z), name(x.w, y.w)};                             \
    }
#define EACH3(name, T)                                                                                           \
    __MSL_INLINE T##2 name(T##2 x, T##2 y, T##2 z) { return T##2{name(x.x, y.x, z.x), name(x.y, y.y, z.y)}; }    \
    __MSL_INLINE T##3 name(T##3 x, T##3 y, T##3 z) {                                                             \
        return T##3{name(x.x, y.x, z.x), name(x.y, y.y, z.y), name(x.z, y.z, z.z)};                              \
    }                                                                                                            \
    __MSL_INLINE T##4 name(T##4 x, T##4 y, T##4 z) {                                                             \
        return T##4{name(x.x, y.x, z.x), name(x.y, y.y, z.y), name(x.z, y.z, z.z), name(x.w, y.w, z.w)};         \
    }

// Half is computed in float and rounded once.
#define F1(name, e)                                                          \
    __MSL_INLINE float name(float x) { return e; }                           \
    __MSL_INLINE half name(half a) { float x = (float)a; return (half)(e); } \
    EACH1(name, float) EACH1(name, half)
#define F2(name, e)                                                                                 \
    __MSL_INLINE float name(float x, float y) { return e; }                                         \
    __MSL_INLINE half name(half a, half b) { float x = (float)a, y = (float)b; return (half)(e); }  \
    EACH2(name, float) EACH2(name, half)
#define F3(name, e)                                                                     \
    __MSL_INLINE float name(float x, float y, float z) { return e; }                    \
    __MSL_INLINE half name(half a, half b, half c) {                                    \
        float x = (float)a, y = (float)b, z = (float)c;                                 \
        return (half)(e);                                                               \
    }                                                                                   \
    EACH3(name, float) EACH3(name, half)

#define FUNCTIONS                                                                                        \
    F1(acos, __builtin_acosf(x)) F1(acosh, __builtin_acoshf(x)) F1(asin, __builtin_asinf(x))             \
    F1(asinh, __builtin_asinhf(x)) F1(atan, __builtin_atanf(x)) F1(atanh, __builtin_atanhf(x))           \
    F1(ceil, __builtin_ceilf(x)) F1(cos, __builtin_cosf(x)) F1(cosh, __builtin_coshf(x))                 \
    F1(cospi, __builtin_cosf(x * M_PI_F)) F1(exp, __builtin_expf(x)) F1(exp2, __builtin_exp2f(x))        \
    F1(exp10, __builtin_powf(10.f, x)) F1(fabs, __builtin_fabsf(x)) F1(floor, __builtin_floorf(x))       \
    F1(fract, x - __builtin_floorf(x)) F1(log, __builtin_logf(x)) F1(log2, __builtin_log2f(x))           \
    F1(log10, __builtin_log10f(x)) F1(rint, __builtin_rintf(x)) F1(round, __builtin_roundf(x))           \
    F1(rsqrt, 1.f / __builtin_sqrtf(x)) F1(sin, __builtin_sinf(x)) F1(sinh, __builtin_sinhf(x))          \
    F1(sinpi, __builtin_sinf(x * M_PI_F)) F1(sqrt, __builtin_sqrtf(x)) F1(tan, __builtin_tanf(x))        \
    F1(tanh, __builtin_tanhf(x)) F1(tanpi, __builtin_tanf(x * M_PI_F)) F1(trunc, __builtin_truncf(x))    \
    F1(sign, x > 0 ? 1.f : x < 0 ? -1.f : x == 0 ? x : 0.f)                                              \
    F1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.f), 1.f))                                          \
    F2(atan2, __builtin_atan2f(x, y)) F2(copysign, __builtin_copysignf(x, y)) F2(divide, x / y)          \
    F2(fdim, __builtin_fdimf(x, y)) F2(fmax, __builtin_fmaxf(x, y)) F2(fmin, __builtin_fminf(x, y))      \
    F2(fmod, __builtin_fmodf(x, y)) F2(pow, __builtin_powf(x, y)) F2(powr, __builtin_powf(x, y))         \
    F2(nextafter, __builtin_nextafterf(x, y)) F2(step, y < x ? 0.f : 1.f)                                \
    F3(fma, __builtin_fmaf(x, y, z)) F3(mix, x + (y - x) * z)                                            \
    F3(fmax3, __builtin_fmaxf(x, __builtin_fmaxf(y, z))) F3(fmin3, __builtin_fminf(x, __builtin_fminf(y, z))) \
    F3(fmedian3, __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z)))
FUNCTIONS
namespace precise { FUNCTIONS }
namespace fast { FUNCTIONS }

#define ORDER(T, smaller, larger)                                                                        \
    __MSL_INLINE T min(T x, T y) { return smaller; }                                                     \
    __MSL_INLINE T max(T x, T y) { return larger; }                                                      \
    EACH2(min, T) EACH2(max, T)                                                                          \
    __MSL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }                          \
    EACH3(clamp, T)                                                                                      \
    __MSL_INLINE T##2 clamp(T##2 x, T low, T high) { return clamp(x, (T##2)low, (T##2)high); }           \
    __MSL_INLINE T##3 clamp(T##3 x, T low, T high) { return clamp(x, (T##3)low, (T##3)high); }           \
    __MSL_INLINE T##4 clamp(T##4 x, T low, T high) { return clamp(x, (T##4)low, (T##4)high); }           \
    __MSL_INLINE T min3(T x, T y, T z) { return min(x, min(y, z)); }                                     \
    __MSL_INLINE T max3(T x, T y, T z) { return max(x, max(y, z)); }                                     \
    __MSL_INLINE T median3(T x, T y, T z) { return max(min(x, y), min(max(x, y), z)); }
#define M(T) ORDER(T, y < x ? y : x, x < y ? y : x)
__MSL_INTEGERS(M)
#undef M
ORDER(half, fmin(x, y), fmax(x, y))
ORDER(float, fmin(x, y), fmax(x, y))
namespace precise { using metal::clamp; using metal::max; using metal::min; }
namespace fast { using metal::clamp; using metal::max; using metal::min; }

#define ABS(T, e) __MSL_INLINE T abs(T x) { return e; } EACH1(abs, T)
ABS(char, x < 0 ? (char)-x : x) ABS(short, x < 0 ? (short)-x : x) ABS(int, x < 0 ? -x : x) ABS(long, x < 0 ? -x : x)
ABS(uchar, x) ABS(ushort, x) ABS(uint, x) ABS(ulong, x) ABS(float, fabs(x)) ABS(half, fabs(x))

#define M(T) __MSL_INLINE T select(T a, T b, bool c) { return c ? b : a; }
__MSL_INTEGERS(M) M(half) M(float)
#undef M
// A comparison of vectors gives integers here, not bool, so the mask is any vector.
template <class V, class Mask, class = enable_if_t<(__msl_n<V>::n > 1) && __msl_n<V>::n == __msl_n<Mask>::n>>
__MSL_INLINE V select(V a, V b, Mask c) {
    for (int i = 0; i < __msl_n<V>::n; i++) a[i] = c[i] ? b[i] : a[i];
    return a;
}
template <class V>
__MSL_INLINE bool any(V v) {
    bool r = false;
    for (int i = 0; i < __msl_n<V>::n; i++) r |= v[i] != 0;
    return r;
}
template <class V>
__MSL_INLINE bool all(V v) {
    bool r = true;
    for (int i = 0; i < __msl_n<V>::n; i++) r &= v[i] != 0;
    return r;
}

#define M(T)                                                                     \
    __MSL_INLINE bool isnan(T x) { return __builtin_isnan((float)x); }           \
    __MSL_INLINE bool isinf(T x) { return __builtin_isinf((float)x); }           \
    __MSL_INLINE bool isfinite(T x) { return __builtin_isfinite((float)x); }     \
    __MSL_INLINE bool signbit(T x) { return __builtin_signbitf((float)x); }
M(float) M(half)
#undef M
__MSL_INLINE bool isnormal(float x) { return __builtin_isnormal(x); }

extern "C" {
float frexpf(float, thread int*);
float modff(float, thread float*);
int ilogbf(float);
}
__MSL_INLINE float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
__MSL_INLINE half ldexp(half x, int e) { return (half)__builtin_ldexpf((float)x, e); }
__MSL_INLINE float frexp(float x, thread int& e) { return frexpf(x, &e); }
__MSL_INLINE half frexp(half x, thread int& e) { return (half)frexpf((float)x, &e); }
__MSL_INLINE int ilogb(float x) { return ilogbf(x); }
__MSL_INLINE float modf(float x, thread float& whole) { return modff(x, &whole); }
__MSL_INLINE float sincos(float x, thread float& c) { c = cos(x); return sin(x); }
namespace precise { using metal::sincos; }
namespace fast { using metal::sincos; }
__MSL_INLINE float smoothstep(float a, float b, float x) {
    float t = clamp((x - a) / (b - a), 0.f, 1.f);
    return t * t * (3.f - 2.f * t);
}

#define M(T)                                                                                              \
    __MSL_INLINE T dot(T##2 a, T##2 b) { return a.x * b.x + a.y * b.y; }                                  \
    __MSL_INLINE T dot(T##3 a, T##3 b) { return a.x * b.x + a.y * b.y + a.z * b.z; }                      \
    __MSL_INLINE T dot(T##4 a, T##4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }          \
    __MSL_INLINE T length(T##2 a) { return sqrt(dot(a, a)); }                                             \
    __MSL_INLINE T length(T##3 a) { return sqrt(dot(a, a)); }                                             \
    __MSL_INLINE T length(T##4 a) { return sqrt(dot(a, a)); }
M(float) M(half)
#undef M

// T is signed or unsigned, U its unsigned twin.
#define BITS(T, U)                                                                                             \
    __MSL_INLINE T popcount(T x) { return (T)__builtin_popcountll((U)x); }                                     \
    __MSL_INLINE T clz(T x) {                                                                                  \
        return x == 0 ? (T)(sizeof(T) * 8) : (T)(__builtin_clzll((ulong)(U)x) - (64 - sizeof(T) * 8));         \
    }                                                                                                          \
    __MSL_INLINE T ctz(T x) { return x == 0 ? (T)(sizeof(T) * 8) : (T)__builtin_ctzll((ulong)(U)x); }          \
    __MSL_INLINE T rotate(T v, T i) {                                                                          \
        uint n = sizeof(T) * 8, s = (uint)i & (n - 1);                                                         \
        return s ? (T)(((U)v << s) | ((U)v >> (n - s))) : v;                                                   \
    }                                                                                                          \
    __MSL_INLINE T extract_bits(T x, uint offset, uint bits) {                                                 \
        if (bits == 0) return 0;                                                                               \
        T t = (T)((U)x << (sizeof(T) * 8 - offset - bits));                                                    \
        return t >> (sizeof(T) * 8 - bits);                                                                    \
    }                                                                                                          \
    __MSL_INLINE T insert_bits(T x, T y, uint offset, uint bits) {                                             \
        U ones = bits >= sizeof(T) * 8 ? (U)~(U)0 : (U)(((U)1 << bits) - 1);                                   \
        U mask = (U)(ones << offset);                                                                          \
        return (T)(((U)x & ~mask) | (((U)y << offset) & mask));                                                \
    }                                                                                                          \
    __MSL_INLINE T reverse_bits(T x) {                                                                         \
        U r = 0;                                                                                               \
        for (uint i = 0; i < sizeof(T) * 8; i++) r |= (U)(((U)x >> i) & 1) << (sizeof(T) * 8 - 1 - i);         \
        return (T)r;                                                                                           \
    }
BITS(char, uchar) BITS(uchar, uchar) BITS(short, ushort) BITS(ushort, ushort)
BITS(int, uint) BITS(uint, uint) BITS(long, ulong) BITS(ulong, ulong)

__MSL_INLINE int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
__MSL_INLINE uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
__MSL_INLINE long mulhi(long a, long b) { return (long)(((__int128)a * b) >> 64); }
__MSL_INLINE ulong mulhi(ulong a, ulong b) { return (ulong)(((unsigned __int128)a * b) >> 64); }
__MSL_INLINE int mul24(int a, int b) { return a * b; }
__MSL_INLINE int mad24(int a, int b, int c) { return a * b + c; }
__MSL_INLINE int addsat(int a, int b) { return __builtin_elementwise_add_sat(a, b); }
__MSL_INLINE uint addsat(uint a, uint b) { return __builtin_elementwise_add_sat(a, b); }
__MSL_INLINE uint subsat(uint a, uint b) { return __builtin_elementwise_sub_sat(a, b); }
__MSL_INLINE uint absdiff(int a, int b) { return a > b ? (uint)a - (uint)b : (uint)b - (uint)a; }
__MSL_INLINE uint absdiff(uint a, uint b) { return a > b ? a - b : b - a; }
__MSL_INLINE float4 unpack_unorm4x8_to_float(uint x) {
    return float4{(x & 255) / 255.f, ((x >> 8) & 255) / 255.f, ((x >> 16) & 255) / 255.f, (x >> 24) / 255.f};
}

#undef EACH1
#undef EACH2
#undef EACH3
#undef F1
#undef F2
#undef F3
#undef FUNCTIONS
#undef ORDER
#undef ABS
#undef BITS
}  // namespace metal
