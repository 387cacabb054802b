// Construction and conversion of vectors. The rewriter turns `float4(...)` into `__msl_mk<float4>(...)`, because
// clang's own constructor of these vectors takes one argument only.
#pragma once

template <class T, class U>
__MSL_INLINE constexpr T as_type(U x) {
    static_assert(sizeof(T) == sizeof(U), "as_type: sizes differ");
    return __builtin_bit_cast(T, x);
}

// Number of components, 1 for a scalar, and the type of one.
template <class V> struct __msl_n { static constexpr constant int n = 1; };
template <class V> struct __msl_element { typedef V type; };
#define ONE(T, name, k)                                                        \
    template <> struct __msl_n<name##k> { static constexpr constant int n = k; }; \
    template <> struct __msl_element<name##k> { typedef T type; };
#define M(T) ONE(T, T, 2) ONE(T, T, 3) ONE(T, T, 4)
__MSL_SCALARS(M)
#undef M
#undef ONE

// Stores components from i on. T is given, since OpenCL deduces V with an address space.
template <class T, class V>
__MSL_INLINE constexpr void __msl_put(thread V& v, int i) {}
template <class T, class V, class U, class... Rest>
__MSL_INLINE constexpr void __msl_put(thread V& v, int i, U x, Rest... rest) {
    constexpr int n = __msl_n<U>::n;
    if constexpr (n == 1) {
        v[i] = (T)x;
    } else {
        for (int k = 0; k < n; k++) v[i + k] = (T)x[k];
    }
    __msl_put<T>(v, i + n, rest...);
}

template <class V>
__MSL_INLINE constexpr V __msl_mk() { return V{}; }
template <class V, class U, class... Rest>
__MSL_INLINE constexpr V __msl_mk(U x, Rest... rest) {
    typedef typename __msl_element<V>::type T;
    if constexpr (__msl_n<V>::n == 1) {
        static_assert(sizeof...(Rest) == 0, "too many initialisers");
        return (V)x;
    } else if constexpr (sizeof...(Rest) == 0 && __msl_n<U>::n == 1) {
        return (V)(T)x;
    } else {
        constexpr int given = (__msl_n<U>::n + ... + __msl_n<Rest>::n);
        static_assert(given == __msl_n<V>::n, "vector constructor: wrong number of components");
        V v = {};
        __msl_put<T>(v, 0, x, rest...);
        return v;
    }
}

// `uint4 v = {a, b, c};` leaves the rest zero.
template <class V, class... Rest>
__MSL_INLINE constexpr V __msl_part(Rest... rest) {
    V v = {};
    __msl_put<typename __msl_element<V>::type>(v, 0, rest...);
    return v;
}

// static_cast of MSL also converts vectors element by element, and between half and bfloat.
template <class To, class From>
__MSL_INLINE constexpr To __msl_cast(From x) {
    if constexpr (__msl_n<To>::n > 1 && __msl_n<From>::n > 1) {
        return __builtin_convertvector(x, To);
    } else if constexpr (metal::is_floating_point_v<To> && metal::is_floating_point_v<From>) {
        return (To)(float)x;
    } else {
        return static_cast<To>(x);
    }
}
