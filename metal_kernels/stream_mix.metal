// pre[t, n] = sigmoid(m[n] * scale[0] + base[n]) + hc_eps
// post[t, n] = 2 * sigmoid(m[N + n] * scale[1] + base[N + n])
// comb[t, j, k] = Sinkhorn(C)[j, k],  C[j, k] = m[2N + N * j + k] * scale[2] + base[2N + N * j + k]
// with m[r] = (sum over s of partial[t, r, s]) / sqrt((sum over s of partial[t, M, s]) / K + norm_eps)
// Sinkhorn: softmax over k and + hc_eps; sum over j; then ITERATIONS - 1 times sum over k, sum over j. Each is
// C / (sum + hc_eps).
//
// Second launch; the first is stream_project.metal, which says why there are two. Grid (simdgroups * 32, T), one
// threadgroup per token: each simdgroup adds the slices of ROWS rows, then the first one does the rest. Its lane
// j * N + k holds comb[j, k] in a register: a normalisation is N shuffles, and every element of a row or column adds
// the same numbers in the same order. Must stay equal to the reference: the order of the steps, the last one over j,
// and every eps in its place (none in post, none in the softmax). Fused because each of these steps on N * N numbers
// would be a launch.
const int lane = thread_index_in_simdgroup;
const int group = simdgroup_index_in_threadgroup;
const size_t token = threadgroup_position_in_grid.y;

threadgroup float sums[M + 1];

for (int r = 0; r < ROWS; r++) {
    const int row = metal::min(group * ROWS + r, M);
    float sum = 0.0f;
    for (int s = lane; s < SLICES; s += 32) {
        sum += partial[(token * (M + 1) + row) * SLICES + s];
    }
    sum = simd_sum(sum);
    if (lane == 0 && group * ROWS + r <= M) {
        sums[row] = sum;
    }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// The whole simdgroup takes this branch, so all lanes meet in the shuffles.
if (group == 0) {
    const float eps = hc_eps[0];
    const float norm = metal::precise::rsqrt(sums[M] / static_cast<float>(K) + norm_eps[0]);

    if (lane < 2 * N) {
        const float z = sums[lane] * norm * (lane < N ? scale[0] : scale[1]) + base[lane];
        const float gate = 1.0f / (1.0f + metal::precise::exp(-z));
        if (lane < N) {
            pre[token * N + lane] = gate + eps;
        } else {
            post[token * N + lane - N] = 2.0f * gate;
        }
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
