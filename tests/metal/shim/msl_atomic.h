// Atomics. Fibers switch only where they wait, so a plain read and write is atomic; it goes through the runtime, so
// that the memory checker sees one atomic access and no plain ones.
#pragma once

extern "C" {
// Reports the access, and leaves the old value in `old`; writes `value` unless it is null.
void __msl_atomic_read(ulong address, void* old, uint bytes);
void __msl_atomic_write(ulong address, const void* value, uint bytes);
}

namespace metal {
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
enum memory_order { memory_order_relaxed, memory_order_acquire_, memory_order_release_, memory_order_acq_rel_, memory_order_seq_cst };
__MSL_INLINE void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

template <class T> struct atomic { T __v; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
typedef atomic<bool> atomic_bool;

template <class T> struct __identity { typedef T type; };
// The value argument must not take part in deduction.
#define VALUE(T) typename __identity<T>::type
#define FETCH(space, name, expression)                                                                \
    template <class T>                                                                                \
    __MSL_INLINE T atomic_fetch_##name##_explicit(volatile space atomic<T>* p, VALUE(T) v, memory_order) { \
        T o;                                                                                          \
        __msl_atomic_read((ulong)p, &o, sizeof(T));                                                   \
        T changed = (T)(expression);                                                                  \
        __msl_atomic_write((ulong)p, &changed, sizeof(T));                                            \
        return o;                                                                                     \
    }
#define ATOMICS(space)                                                                                \
    template <class T>                                                                                \
    __MSL_INLINE T atomic_load_explicit(const volatile space atomic<T>* p, memory_order) {            \
        T o;                                                                                          \
        __msl_atomic_read((ulong)p, &o, sizeof(T));                                                   \
        return o;                                                                                     \
    }                                                                                                 \
    template <class T>                                                                                \
    __MSL_INLINE void atomic_store_explicit(volatile space atomic<T>* p, VALUE(T) v, memory_order) {  \
        T x = v;                                                                                      \
        __msl_atomic_write((ulong)p, &x, sizeof(T));                                                  \
    }                                                                                                 \
    template <class T>                                                                                \
    __MSL_INLINE bool atomic_compare_exchange_weak_explicit(                                          \
        volatile space atomic<T>* p, thread VALUE(T)* expected, VALUE(T) v, memory_order, memory_order) { \
        T o, x = v;                                                                                   \
        __msl_atomic_read((ulong)p, &o, sizeof(T));                                                   \
        bool same = o == *expected;                                                                   \
        if (same) {                                                                                   \
            __msl_atomic_write((ulong)p, &x, sizeof(T));                                              \
        } else {                                                                                      \
            *expected = o;                                                                            \
        }                                                                                             \
        return same;                                                                                  \
    }                                                                                                 \
    template <class T>                                                                                \
    __MSL_INLINE T atomic_exchange_explicit(volatile space atomic<T>* p, VALUE(T) v, memory_order) {  \
        T o, x = v;                                                                                   \
        __msl_atomic_read((ulong)p, &o, sizeof(T));                                                   \
        __msl_atomic_write((ulong)p, &x, sizeof(T));                                                  \
        return o;                                                                                     \
    }                                                                                                 \
    FETCH(space, add, o + v) FETCH(space, sub, o - v)                                                 \
    FETCH(space, and, o & v) FETCH(space, or, o | v) FETCH(space, xor, o ^ v)                         \
    FETCH(space, min, v < o ? v : o) FETCH(space, max, v > o ? v : o)
ATOMICS(device)
ATOMICS(threadgroup)
#undef ATOMICS
#undef FETCH
#undef VALUE
}  // namespace metal
