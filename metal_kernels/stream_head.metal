// y[t] = collapse(x[t], pre, weight), with pre[n] = sigmoid(m[n] * scale[0] + base[n]) + hc_eps
// and m[n] = (sum over s of partial[t, n, s]) / sqrt((sum over s of partial[t, N, s]) / K + norm_eps)
//
// Second launch; the first is stream_project.metal, which says why there are two. Grid (THREADS, T), one threadgroup
// per token: its simdgroups add the slices, every thread makes pre for itself and takes part in the collapse. Must
// stay equal to the reference: every eps in its place, and the rounding of the collapse. Fused because the collapse
// needs nothing but pre.
const int thread_index = thread_position_in_threadgroup.x;
const size_t token = threadgroup_position_in_grid.y;
constexpr int K = N * D;

threadgroup float sums[N + 1];
threadgroup float squares[THREADS / 32];

add_slices<N + 1, SLICES, THREADS>(
    sums, partial + token * (N + 1) * SLICES, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
const float norm = metal::precise::rsqrt(sums[N] / static_cast<float>(K) + norm_eps[0]);
float pre[N];
#pragma clang loop unroll(full)
for (int n = 0; n < N; n++) {
    pre[n] = stream_gate(sums[n] * norm * scale[0] + base[n]) + hc_eps[0];
}
collapse<Elem, N, D, THREADS>(y + token * D, x + token * K, pre, weight, norm_eps[0], squares, thread_index);
