// y[t] = collapse(x[t], pre, weight), with pre[n] = sigmoid(m[n] * scale[0] + base[n]) + hc_eps
// post[t, n] = 2 * sigmoid(m[N + n] * scale[1] + base[N + n])
// comb[t, j, k] = Sinkhorn(C)[j, k],  C[j, k] = m[2N + N * j + k] * scale[2] + base[2N + N * j + k]
// with m[r] = (sum over s of partial[t, r, s]) / sqrt((sum over s of partial[t, M, s]) / K + norm_eps)
// Sinkhorn: softmax over k and + hc_eps; sum over j; then ITERATIONS - 1 times sum over k, sum over j. Each is
// C / (sum + hc_eps).
//
// Second launch; the first is stream_project.metal, which says why there are two. Grid (THREADS, T), one threadgroup
// per token: its simdgroups add the slices, every thread makes pre for itself and takes part in the collapse, and the
// first simdgroup goes on with the rest. Its lane j * N + k holds comb[j, k] in a register: a normalisation is N
// shuffles, and every element of a row or column adds the same numbers in the same order. Must stay equal to the
// reference: the order of the steps, the last one over j, every eps in its place (none in post, none in the softmax),
// and the rounding of the collapse. Fused because each step on N * N numbers would be a launch, and because the
// collapse needs nothing but pre.
const int thread_index = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int group = simdgroup_index_in_threadgroup;
const size_t token = threadgroup_position_in_grid.y;
constexpr int K = N * D;

threadgroup float sums[M + 1];
threadgroup float squares[THREADS / 32];

add_slices<M + 1, SLICES, THREADS>(sums, partial + token * (M + 1) * SLICES, group, lane);
const float eps = hc_eps[0];
const float norm = metal::precise::rsqrt(sums[M] / static_cast<float>(K) + norm_eps[0]);
float pre[N];
#pragma clang loop unroll(full)
for (int n = 0; n < N; n++) {
    pre[n] = stream_gate(sums[n] * norm * scale[0] + base[n]) + eps;
}
collapse<Elem, N, D, THREADS>(y + token * D, x + token * K, pre, weight, norm_eps[0], squares, thread_index);

// The whole simdgroup takes this branch, so all lanes meet in the shuffles.
if (group == 0) {
    if (lane < N) {
        post[token * N + lane] = 2.0f * stream_gate(sums[N + lane] * norm * scale[1] + base[N + lane]);
    }

    // Lanes beyond the matrix repeat its last row, and are not written.
    const int j = metal::min(lane / N, N - 1);
    const int k = lane % N;
    float c = sums[2 * N + j * N + k] * norm * scale[2] + base[2 * N + j * N + k];
    float top = c;
    for (int i = 0; i < N; i++) {
        top = metal::max(top, simd_shuffle(c, static_cast<ushort>(j * N + i)));
    }
    c = metal::precise::exp(c - top);
    float total = 0.0f;
    for (int i = 0; i < N; i++) {
        total += simd_shuffle(c, static_cast<ushort>(j * N + i));
    }
    c = c / total + eps;
    for (int step = 1; step < 2 * ITERATIONS; step++) {
        const bool over_source = step % 2 == 1;
        const int from = over_source ? k : j * N;
        const int stride = over_source ? N : 1;
        float sum = 0.0f;
        for (int i = 0; i < N; i++) {
            sum += simd_shuffle(c, static_cast<ushort>(from + i * stride));
        }
        c = c / (sum + eps);
    }
    if (lane < N * N) {
        comb[token * N * N + lane] = c;
    }
}
