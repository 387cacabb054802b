// y[t, d] = s[t, d] / sqrt(mean over d of s[t, d]^2 + eps) * weight[d],  s[t, d] = sum over n of pre[t, n] * x[t, n, d]
//
// Grid (THREADS, T), one threadgroup per token; thread i owns elements i, i + THREADS, ... Streams are added in
// order in float and s is rounded to Elem before it is squared, as in the reference. Fused because s would else be
// written and read back; it is computed twice instead, from streams that are still in the cache.
const uint thread_index = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const size_t token = threadgroup_position_in_grid.y;

threadgroup float partial[32];

float squares = 0.0f;
for (int d = thread_index; d < D; d += THREADS) {
    float s = 0.0f;
    for (int n = 0; n < N; n++) {
        s += pre[token * N + n] * static_cast<float>(x[(token * N + n) * D + d]);
    }
    const float rounded = static_cast<float>(static_cast<Elem>(s));
    squares += rounded * rounded;
}
squares = simd_sum(squares);
if (lane == 0) {
    partial[group] = squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float total = 0.0f;
for (int i = 0; i < THREADS / 32; i++) {
    total += partial[i];
}
const float scale = metal::precise::rsqrt(total / static_cast<float>(D) + eps[0]);

for (int d = thread_index; d < D; d += THREADS) {
    float s = 0.0f;
    for (int n = 0; n < N; n++) {
        s += pre[token * N + n] * static_cast<float>(x[(token * N + n) * D + d]);
    }
    const float rounded = static_cast<float>(static_cast<Elem>(s));
    y[token * D + d] = static_cast<Elem>(rounded * scale * static_cast<float>(weight[d]));
}
