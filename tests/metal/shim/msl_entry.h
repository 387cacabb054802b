// From the runtime's call to the kernel: buffer addresses and positions become the types of the kernel's parameters.
#pragma once

// The same layout as in runtime.h; the names are MSL's.
struct __msl_position {
    uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
    uint3 threads_per_threadgroup, dispatch_threads_per_threadgroup, threads_per_grid, grid_size;
    uint3 threadgroups_per_grid, grid_origin;
    uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
    uint simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, threads_per_simdgroup;
    uint thread_execution_width, thread_index_in_quadgroup, quadgroup_index_in_threadgroup;
    uint quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
};

// Type of parameter I of a function.
template <int I, class First, class... Rest> struct __msl_nth { typedef typename __msl_nth<I - 1, Rest...>::type type; };
template <class First, class... Rest> struct __msl_nth<0, First, Rest...> { typedef First type; };
template <class F> struct __msl_signature;
template <class R, class... A> struct __msl_signature<R(A...)> {
    template <int I> using argument = typename __msl_nth<I, A...>::type;
};

template <class T> struct __msl_buffer {
    static __MSL_INLINE T at(ulong address) { return (T)address; }
};
template <class T> struct __msl_buffer<device T&> {
    static __MSL_INLINE device T& at(ulong address) { return *(device T*)address; }
};
template <class T> struct __msl_buffer<constant T&> {
    static __MSL_INLINE constant T& at(ulong address) { return *(constant T*)address; }
};

template <class V>
__MSL_INLINE metal::remove_cv_t<V> __msl_builtin(uint3 x) {
    typedef metal::remove_cv_t<V> U;
    if constexpr (__msl_n<U>::n == 1) {
        return (U)x.x;
    } else {
        U r;
        for (int i = 0; i < __msl_n<U>::n; i++) r[i] = x[i];
        return r;
    }
}
template <class V>
__MSL_INLINE metal::remove_cv_t<V> __msl_builtin(uint x) { return (metal::remove_cv_t<V>)x; }
