// simdgroup_matrix, 8 x 8. Each lane holds two neighbours of a row, in the layout that MLX's mma.h relies on.
#pragma once

namespace metal {
__MSL_INLINE uint __matrix_row() {
    uint lane = __msl_lane();
    return ((lane / 4) & 4) + (lane / 2) % 4;
}
__MSL_INLINE uint __matrix_column() {
    uint lane = __msl_lane();
    return ((lane / 4) & 2) * 2 + (lane % 2) * 2;
}
// The lane that holds element (row, column).
__MSL_INLINE uint __matrix_lane(uint row, uint column) {
    return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + ((column & 2) >> 1);
}

template <class T, int R, int C>
struct simdgroup_matrix {
    vec<T, 2> __e;
    simdgroup_matrix() = default;
    // v on the diagonal
    explicit simdgroup_matrix(T v) {
        uint row = __matrix_row(), column = __matrix_column();
        __e.x = row == column ? v : (T)0;
        __e.y = row == column + 1 ? v : (T)0;
    }
    thread vec<T, 2>& thread_elements() { return __e; }
    const thread vec<T, 2>& thread_elements() const { return __e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int R, int C = R>
__MSL_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
    simdgroup_matrix<T, R, C> m;
    m.__e = v;
    return m;
}

// All 32 lanes must arrive together; no memory is ordered by that.
__MSL_INLINE ulong __matrix_exchange(float4 x, int line, uint op) {
    ulong s = __exchange(x, line, op);
    if ((STATE(s)->mask & 0xffffffffu) != 0xffffffffu) __msl_trap(2, line);
    return s;
}

#define LOAD_STORE(space)                                                                                           \
    template <class T>                                                                                              \
    __MSL_INLINE void simdgroup_load(                                                                               \
        thread simdgroup_matrix<T, 8, 8>& d, const space T* p, ulong stride = 8, ulong2 origin = 0,                 \
        bool transposed = false, __MSL_LINE) {                                                                      \
        __matrix_exchange(float4{0, 0, 0, 0}, __line, __op_matrix_move);                                            \
        ulong m = __matrix_row() + origin.y, n = __matrix_column() + origin.x;                                      \
        d.__e.x = transposed ? p[n * stride + m] : p[m * stride + n];                                               \
        d.__e.y = transposed ? p[(n + 1) * stride + m] : p[m * stride + n + 1];                                     \
    }                                                                                                               \
    template <class T>                                                                                              \
    __MSL_INLINE void simdgroup_store(                                                                              \
        simdgroup_matrix<T, 8, 8> d, space T* p, ulong stride = 8, ulong2 origin = 0, bool transposed = false,      \
        __MSL_LINE) {                                                                                               \
        __matrix_exchange(float4{0, 0, 0, 0}, __line, __op_matrix_move);                                            \
        ulong m = __matrix_row() + origin.y, n = __matrix_column() + origin.x;                                      \
        p[transposed ? n * stride + m : m * stride + n] = d.__e.x;                                                  \
        p[transposed ? (n + 1) * stride + m : m * stride + n + 1] = d.__e.y;                                        \
    }
LOAD_STORE(device)
LOAD_STORE(threadgroup)
#undef LOAD_STORE

// d = a b + c, accumulated in float.
template <class T, class A, class B, class C>
__MSL_INLINE void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<T, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a, thread simdgroup_matrix<B, 8, 8>& b,
    thread simdgroup_matrix<C, 8, 8>& c, __MSL_LINE) {
    float4 own = float4{(float)a.__e.x, (float)a.__e.y, (float)b.__e.x, (float)b.__e.y};
    ulong s = __matrix_exchange(own, __line, __op_matrix);
    float x = (float)c.__e.x, y = (float)c.__e.y;
    uint row = __matrix_row(), column = __matrix_column();
    for (uint k = 0; k < 8; k++) {
        float4 left = __value_of<float4>(s, __matrix_lane(row, k));
        float4 right = __value_of<float4>(s, __matrix_lane(k, column));
        float factor = k & 1 ? left.y : left.x;
        x += factor * right.z;
        y += factor * right.w;
    }
    d.__e.x = (T)x;
    d.__e.y = (T)y;
}
template <class T, class A, class B>
__MSL_INLINE void simdgroup_multiply(
    thread simdgroup_matrix<T, 8, 8>& d, thread simdgroup_matrix<A, 8, 8>& a, thread simdgroup_matrix<B, 8, 8>& b,
    __MSL_LINE) {
    simdgroup_matrix<T, 8, 8> zero;
    zero.__e = (T)0;
    simdgroup_multiply_accumulate(d, a, b, zero, __line);
}
template <class T>
__MSL_INLINE simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
    simdgroup_matrix<T, 8, 8> d;
    simdgroup_multiply(d, a, b);
    return d;
}
}  // namespace metal
