// y[t, d] = x[t, d] / sqrt(mean over d of x[t, d]^2 + eps) * weight[d], the last factor if WEIGHTED
//
// Grid (THREADS, rows), one threadgroup per row; thread i owns elements i, i + THREADS, ... and keeps them in registers
// (which is why its loops are unrolled by order). Rounded to Elem once, after the weight, as in the reference.
const int thread_index = thread_position_in_threadgroup.x;
const size_t row = threadgroup_position_in_grid.y;
constexpr int OWNED = (D + THREADS - 1) / THREADS;

threadgroup float partial[THREADS / 32];

float owned[OWNED];
float squares = 0.0f;
#pragma clang loop unroll(full)
for (int i = 0; i < OWNED; i++) {
    const int d = i * THREADS + thread_index;
    owned[i] = d < D ? static_cast<float>(x[row * D + d]) : 0.0f;
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
const float norm = metal::precise::rsqrt(total / static_cast<float>(D) + eps[0]);

#pragma clang loop unroll(full)
for (int i = 0; i < OWNED; i++) {
    const int d = i * THREADS + thread_index;
    if (d < D) {
        y[row * D + d] = static_cast<Elem>(owned[i] * norm * (WEIGHTED ? static_cast<float>(weight[d]) : 1.0f));
    }
}
