// y[t, d] = s[t, d] / sqrt(mean over d of s[t, d]^2 + eps) * weight[d],  s[t, d] = sum over n of pre[t, n] * x[t, n, d]
//
// Grid (THREADS, T), one threadgroup per token; thread i owns elements i, i + THREADS, ... and keeps their s in
// registers (which is why its loops are unrolled by order). Streams are added in order in float and s is rounded to
// Elem before it is squared, as in the reference. Fused because s would else be written and read back.
const int thread_index = thread_position_in_threadgroup.x;
const size_t token = threadgroup_position_in_grid.y;
constexpr int OWNED = (D + THREADS - 1) / THREADS;

threadgroup float partial[THREADS / 32];

float owned[OWNED];
float squares = 0.0f;
#pragma clang loop unroll(full)
for (int i = 0; i < OWNED; i++) {
    const int d = i * THREADS + thread_index;
    float s = 0.0f;
    if (d < D) {
        for (int n = 0; n < N; n++) {
            s += pre[token * N + n] * static_cast<float>(x[(token * N + n) * D + d]);
        }
    }
    owned[i] = static_cast<float>(static_cast<Elem>(s));
    squares += owned[i] * owned[i];
}
squares = simd_sum(squares);
if (thread_index_in_simdgroup == 0) {
    partial[simdgroup_index_in_threadgroup] = squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float total = 0.0f;
for (int i = 0; i < THREADS / 32; i++) {
    total += partial[i];
}
const float scale = metal::precise::rsqrt(total / static_cast<float>(D) + eps[0]);

#pragma clang loop unroll(full)
for (int i = 0; i < OWNED; i++) {
    const int d = i * THREADS + thread_index;
    if (d < D) {
        y[token * D + d] = static_cast<Elem>(owned[i] * scale * static_cast<float>(weight[d]));
    }
}
