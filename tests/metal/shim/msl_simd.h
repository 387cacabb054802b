// Barriers and functions of a simdgroup.
//
// A collective hands its value to the runtime and waits; when all live lanes of the simdgroup wait at the same
// function and source line, each continues and reads what the others left. The line comes in as a default argument,
// which is evaluated at the call.
#pragma once

// The same layout as in runtime.h.
struct __msl_simd {
    ulong mask;        // lanes that took part in the last collective
    uint computed[2];  // whether `result` is valid
    uint parity;       // half of `slot` that the next collective fills
    uint unused;
    uchar slot[2][32][32] __attribute__((aligned(32)));
    uchar result[2][32];
};

extern "C" {
ulong __msl_sync_simd(const void* value, uint bytes, int line, uint op);
void __msl_threadgroup_barrier(uint flags, int line);
void __msl_simdgroup_barrier(uint flags, int line);
void __msl_trap(uint reason, int line);
uint __msl_lane();
ulong __msl_threadgroup_variable(uint id, ulong bytes, uint align);
}
#define __MSL_LINE int __line = __builtin_LINE()

// A type as one name, so that the rewriter can write `__msl_t<float[4]>&`.
template <class T> using __msl_t = T;
template <class A, uint ID>
__MSL_INLINE threadgroup A& __msl_tg() {
    return *(threadgroup A*)__msl_threadgroup_variable(ID, sizeof(A), alignof(A));
}

namespace metal {
enum class mem_flags {
    mem_none = 0,
    mem_device = 1,
    mem_threadgroup = 2,
    mem_texture = 4,
    mem_threadgroup_imageblock = 8,
    mem_object_data = 16
};
__MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
__MSL_INLINE void threadgroup_barrier(mem_flags flags, __MSL_LINE) { __msl_threadgroup_barrier((uint)flags, __line); }
__MSL_INLINE void simdgroup_barrier(mem_flags flags, __MSL_LINE) { __msl_simdgroup_barrier((uint)flags, __line); }

// Numbers that tell collectives apart; 1 is simdgroup_barrier.
enum __op {
    __op_sum = 2, __op_product, __op_min, __op_max, __op_and, __op_or, __op_xor,
    __op_inclusive_sum, __op_exclusive_sum, __op_inclusive_product, __op_exclusive_product,
    __op_broadcast, __op_shuffle, __op_shuffle_xor, __op_down, __op_up, __op_rotate_down, __op_rotate_up,
    __op_fill_up, __op_fill_down, __op_fill, __op_first,
    __op_quad_broadcast, __op_quad_shuffle, __op_quad_xor, __op_quad_down, __op_quad_sum, __op_quad_max,
    __op_ballot, __op_active, __op_matrix, __op_matrix_move
};

#define STATE(s) ((device __msl_simd*)(s))
template <class T>
__MSL_INLINE ulong __exchange(T x, int line, uint op) {
    static_assert(sizeof(T) <= 32, "value too large for a simdgroup function");
    return __msl_sync_simd(&x, sizeof(T), line, op);
}
__MSL_INLINE bool __active(ulong s, uint lane) { return lane < 32 && (STATE(s)->mask >> lane & 1); }
template <class T>
__MSL_INLINE T __value_of(ulong s, uint lane) {
    return *(device T*)STATE(s)->slot[STATE(s)->parity ^ 1][lane];
}
// Reading a lane that is out of range or has returned is an error, ...
template <class T>
__MSL_INLINE T __read_lane(ulong s, uint lane, T own, int line) {
    if (!__active(s, lane)) {
        __msl_trap(1, line);
        return own;
    }
    return __value_of<T>(s, lane);
}
// ... except for the shuffles that are defined to leave such lanes alone.
template <class T>
__MSL_INLINE T __read_lane_or_own(ulong s, uint lane, T own) {
    return __active(s, lane) ? __value_of<T>(s, lane) : own;
}

// Adds in a tree of distances 16, 8, 4, 2, 1. The first lane to leave computes it for all.
#define REDUCTION(name, expression)                                                \
    template <class T>                                                             \
    __MSL_INLINE T __reduce_##name(T x, int line) {                                \
        ulong s = __exchange(x, line, __op_##name);                                \
        uint half_ = STATE(s)->parity ^ 1;                                         \
        device T* result = (device T*)STATE(s)->result[half_];                     \
        if (!STATE(s)->computed[half_]) {                                          \
            T v[32];                                                               \
            bool on[32];                                                           \
            for (uint i = 0; i < 32; i++) {                                        \
                on[i] = __active(s, i);                                            \
                v[i] = on[i] ? __value_of<T>(s, i) : x;                            \
            }                                                                      \
            for (int d = 16; d; d >>= 1) {                                         \
                for (int i = 0; i < d; i++) {                                      \
                    if (!on[i + d]) continue;                                      \
                    T a = v[i], b = v[i + d];                                      \
                    v[i] = on[i] ? (T)(expression) : b;                            \
                    on[i] = true;                                                  \
                }                                                                  \
            }                                                                      \
            *result = v[0];                                                        \
            STATE(s)->computed[half_] = 1;                                         \
        }                                                                          \
        return *result;                                                            \
    }
REDUCTION(sum, a + b)
REDUCTION(product, a * b)
REDUCTION(min, min(a, b))
REDUCTION(max, max(a, b))
REDUCTION(and, a & b)
REDUCTION(or, a | b)
REDUCTION(xor, a ^ b)

#define SCAN(name, start, expression, own)                              \
    template <class T>                                                  \
    __MSL_INLINE T __scan_##name(T x, int line) {                       \
        ulong s = __exchange(x, line, __op_##name);                     \
        T a = (T)start;                                                 \
        for (uint i = 0; i < __msl_lane() + own; i++) {                 \
            if (!__active(s, i)) continue;                              \
            T b = __value_of<T>(s, i);                                  \
            a = expression;                                             \
        }                                                               \
        return a;                                                       \
    }
SCAN(inclusive_sum, 0, a + b, 1)
SCAN(exclusive_sum, 0, a + b, 0)
SCAN(inclusive_product, 1, a * b, 1)
SCAN(exclusive_product, 1, a * b, 0)

template <class T>
__MSL_INLINE T __fill_up(T x, T filling, uint delta, int line) {
    ulong s = __exchange(x, line, __op_fill_up);
    uint me = __msl_lane();
    T shifted = __read_lane_or_own(s, me - delta, x);
    ulong f = __exchange(filling, line, __op_fill);
    return me >= delta ? shifted : __read_lane_or_own(f, 32 + me - delta, filling);
}
template <class T>
__MSL_INLINE T __fill_down(T x, T filling, uint delta, int line) {
    ulong s = __exchange(x, line, __op_fill_down);
    uint me = __msl_lane();
    T shifted = __read_lane_or_own(s, me + delta, x);
    ulong f = __exchange(filling, line, __op_fill);
    return me + delta < 32 ? shifted : __read_lane_or_own(f, me + delta - 32, filling);
}

// name(T x, ushort n): the value of the lane that `lane` computes from n and the own lane `me`.
#define MOVE(T, name, op, lane)                                       \
    __MSL_INLINE T name(T x, ushort n, __MSL_LINE) {                  \
        ulong s = __exchange(x, __line, op);                          \
        uint me = __msl_lane();                                       \
        return __read_lane(s, lane, x, __line);                       \
    }
#define MOVE_OR_OWN(T, name, op, inside, lane)                        \
    __MSL_INLINE T name(T x, ushort n, __MSL_LINE) {                  \
        ulong s = __exchange(x, __line, op);                          \
        uint me = __msl_lane();                                       \
        return inside ? __read_lane_or_own(s, lane, x) : x;           \
    }
#define MOVES(T)                                                                                                 \
    MOVE(T, simd_broadcast, __op_broadcast, n)                                                                   \
    MOVE(T, simd_shuffle, __op_shuffle, n)                                                                       \
    MOVE(T, simd_shuffle_xor, __op_shuffle_xor, me ^ n)                                                          \
    MOVE(T, simd_shuffle_rotate_down, __op_rotate_down, (me + n) & 31)                                           \
    MOVE(T, simd_shuffle_rotate_up, __op_rotate_up, (me - n) & 31)                                               \
    MOVE(T, quad_broadcast, __op_quad_broadcast, (me & ~3u) + n)                                                 \
    MOVE(T, quad_shuffle, __op_quad_shuffle, (me & ~3u) + n)                                                     \
    MOVE(T, quad_shuffle_xor, __op_quad_xor, me ^ n)                                                             \
    MOVE_OR_OWN(T, simd_shuffle_down, __op_down, true, me + n)                                                   \
    MOVE_OR_OWN(T, simd_shuffle_up, __op_up, true, me - n)                                                       \
    MOVE_OR_OWN(T, quad_shuffle_down, __op_quad_down, (me & 3) + n < 4, me + n)                                  \
    __MSL_INLINE T simd_shuffle_and_fill_up(T x, T f, ushort n, __MSL_LINE) { return __fill_up(x, f, n, __line); } \
    __MSL_INLINE T simd_shuffle_and_fill_down(T x, T f, ushort n, __MSL_LINE) {                                  \
        return __fill_down(x, f, n, __line);                                                                     \
    }                                                                                                            \
    __MSL_INLINE T simd_broadcast_first(T x, __MSL_LINE) {                                                       \
        ulong s = __exchange(x, __line, __op_first);                                                             \
        return __value_of<T>(s, __builtin_ctzll(STATE(s)->mask));                                                \
    }
#define REDUCTIONS(T)                                                                                            \
    __MSL_INLINE T simd_sum(T x, __MSL_LINE) { return __reduce_sum(x, __line); }                                 \
    __MSL_INLINE T simd_product(T x, __MSL_LINE) { return __reduce_product(x, __line); }                         \
    __MSL_INLINE T simd_min(T x, __MSL_LINE) { return __reduce_min(x, __line); }                                 \
    __MSL_INLINE T simd_max(T x, __MSL_LINE) { return __reduce_max(x, __line); }                                 \
    __MSL_INLINE T simd_prefix_inclusive_sum(T x, __MSL_LINE) { return __scan_inclusive_sum(x, __line); }        \
    __MSL_INLINE T simd_prefix_exclusive_sum(T x, __MSL_LINE) { return __scan_exclusive_sum(x, __line); }        \
    __MSL_INLINE T simd_prefix_inclusive_product(T x, __MSL_LINE) { return __scan_inclusive_product(x, __line); } \
    __MSL_INLINE T simd_prefix_exclusive_product(T x, __MSL_LINE) { return __scan_exclusive_product(x, __line); } \
    __MSL_INLINE T quad_sum(T x, __MSL_LINE) {                                                                   \
        ulong s = __exchange(x, __line, __op_quad_sum);                                                          \
        uint q = __msl_lane() & ~3u;                                                                             \
        T a = __read_lane(s, q, x, __line) + __read_lane(s, q + 1, x, __line);                                   \
        T b = __read_lane(s, q + 2, x, __line) + __read_lane(s, q + 3, x, __line);                               \
        return a + b;                                                                                            \
    }                                                                                                            \
    __MSL_INLINE T quad_max(T x, __MSL_LINE) {                                                                   \
        ulong s = __exchange(x, __line, __op_quad_max);                                                          \
        uint q = __msl_lane() & ~3u;                                                                             \
        T a = max(__read_lane(s, q, x, __line), __read_lane(s, q + 1, x, __line));                               \
        return max(a, max(__read_lane(s, q + 2, x, __line), __read_lane(s, q + 3, x, __line)));                  \
    }
#define BITWISE(T)                                                                    \
    __MSL_INLINE T simd_and(T x, __MSL_LINE) { return __reduce_and(x, __line); }      \
    __MSL_INLINE T simd_or(T x, __MSL_LINE) { return __reduce_or(x, __line); }        \
    __MSL_INLINE T simd_xor(T x, __MSL_LINE) { return __reduce_xor(x, __line); }
// No 64-bit integers and no bfloat, as in Metal; MLX's utils.h adds those of bfloat.
#define M(T) MOVES(T) MOVES(T##2) MOVES(T##3) MOVES(T##4) REDUCTIONS(T) REDUCTIONS(T##2) REDUCTIONS(T##3) REDUCTIONS(T##4)
M(char) M(uchar) M(short) M(ushort) M(int) M(uint) M(half) M(float)
#undef M
#define M(T) BITWISE(T) BITWISE(T##2) BITWISE(T##3) BITWISE(T##4)
M(char) M(uchar) M(short) M(ushort) M(int) M(uint)
#undef M

struct simd_vote {
    typedef ulong vote_t;
    ulong v;
    simd_vote(ulong x = 0) : v(x) {}
    operator ulong() const { return v; }
    bool all() const { return (v & 0xffffffffu) == 0xffffffffu; }
    bool any() const { return v != 0; }
};
__MSL_INLINE ulong __ballot(bool p, int line) {
    ulong s = __exchange((uint)p, line, __op_ballot), votes = 0;
    for (uint i = 0; i < 32; i++) {
        if (__active(s, i) && __value_of<uint>(s, i)) votes |= 1ul << i;
    }
    return votes;
}
__MSL_INLINE simd_vote simd_ballot(bool p, __MSL_LINE) { return simd_vote(__ballot(p, __line)); }
__MSL_INLINE bool simd_any(bool p, __MSL_LINE) { return __ballot(p, __line) != 0; }
__MSL_INLINE bool simd_all(bool p, __MSL_LINE) { return __ballot(!p, __line) == 0; }
__MSL_INLINE simd_vote simd_active_threads_mask(__MSL_LINE) {
    ulong s = __exchange(0u, __line, __op_active);
    return simd_vote(STATE(s)->mask);
}
__MSL_INLINE bool simd_is_first(__MSL_LINE) {
    ulong s = __exchange(0u, __line, __op_active);
    return (uint)__builtin_ctzll(STATE(s)->mask) == __msl_lane();
}

#undef REDUCTION
#undef SCAN
#undef MOVE
#undef MOVE_OR_OWN
#undef MOVES
#undef REDUCTIONS
#undef BITWISE
}  // namespace metal
