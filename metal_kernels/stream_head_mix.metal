// pre[t, n] = sigmoid(m[n] * scale[0] + base[n]) + hc_eps
// with m[n] = (sum over s of partial[t, n, s]) / sqrt((sum over s of partial[t, N, s]) / K + norm_eps)
//
// Second launch; the first is stream_project.metal, which says why there are two. Grid (32, T), one simdgroup per
// token: its lanes add the slices of one row after the other, and lane n keeps row n.
const int lane = thread_index_in_simdgroup;
const size_t token = threadgroup_position_in_grid.y;

float mine = 0.0f;
float squares = 0.0f;
for (int row = 0; row <= N; row++) {
    float sum = 0.0f;
    for (int s = lane; s < SLICES; s += 32) {
        sum += partial[(token * (N + 1) + row) * SLICES + s];
    }
    squares = simd_sum(sum);
    mine = row == lane ? squares : mine;
}
if (lane < N) {
    const float norm = metal::precise::rsqrt(squares / static_cast<float>(K) + norm_eps[0]);
    const float z = mine * norm * scale[0] + base[lane];
    pre[token * N + lane] = 1.0f / (1.0f + metal::precise::exp(-z)) + hc_eps[0];
}
