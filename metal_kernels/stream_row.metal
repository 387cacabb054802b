// What the second launches of stream_enter and stream_head share. `group` is the simdgroup of a threadgroup of THREADS.

// sums[r] = sum over s of partial[r, s] for ROWS rows; simdgroups take turns.
template <int ROWS, int SLICES, int THREADS, typename Partial>
inline void add_slices(threadgroup float* sums, Partial partial, int group, int lane) {
    for (int row = group; row < ROWS; row += THREADS / 32) {
        float sum = 0.0f;
        for (int s = lane; s < SLICES; s += 32) {
            sum += partial[row * SLICES + s];
        }
        sum = simd_sum(sum);
        if (lane == 0) {
            sums[row] = sum;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

inline float stream_gate(float z) {
    return 1.0f / (1.0f + metal::precise::exp(-z));
}

// y[d] = s[d] / sqrt(mean over d of s[d]^2 + eps) * weight[d],  s[d] = sum over n of pre[n] * x[n, d]
// Thread i owns elements i, i + THREADS, ... and keeps their s in registers, which is why the loops are unrolled by
// order. Streams are added in order in float and s is rounded to Elem before it is squared, as in the reference.
template <typename Elem, int N, int D, int THREADS, typename Streams, typename Weight>
inline void collapse(
    device Elem* y, Streams x, const thread float* pre, Weight weight, float eps, threadgroup float* squares_of_group,
    int thread_index) {
    constexpr int OWNED = (D + THREADS - 1) / THREADS;
    float owned[OWNED];
    float squares = 0.0f;
    #pragma clang loop unroll(full)
    for (int i = 0; i < OWNED; i++) {
        const int d = i * THREADS + thread_index;
        float s = 0.0f;
        if (d < D) {
            #pragma clang loop unroll(full)
            for (int n = 0; n < N; n++) {
                s += pre[n] * static_cast<float>(x[n * D + d]);
            }
        }
        owned[i] = static_cast<float>(static_cast<Elem>(s));
        squares += owned[i] * owned[i];
    }
    squares = simd_sum(squares);
    if (thread_index % 32 == 0) {
        squares_of_group[thread_index / 32] = squares;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float total = 0.0f;
    for (int i = 0; i < THREADS / 32; i++) {
        total += squares_of_group[i];
    }
    const float scale = metal::precise::rsqrt(total / static_cast<float>(D) + eps);
    #pragma clang loop unroll(full)
    for (int i = 0; i < OWNED; i++) {
        const int d = i * THREADS + thread_index;
        if (d < D) {
            y[d] = static_cast<Elem>(owned[i] * scale * static_cast<float>(weight[d]));
        }
    }
}
