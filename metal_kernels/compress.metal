// e[s, c] = sum over m of softmax_m(gate[s, m, c]) * kv[s, m, c], channel by channel; then
// out[s] = e[s] / sqrt(mean(e[s]^2) + eps) * weight, its last P values rotated by the angles of s, and
// QUANT 1: the K - P others rounded to e4m3 in blocks of 64; QUANT 2: all transformed and rounded to e2m1, blocks of 32
// BYTES: of a packed row, written as pack.metal says; 0 for one of Elem
//
// Grid (THREADS, groups of tokens), one threadgroup per group. A thread pools pairs of channels, candidates in order;
// then the first simdgroup has the row in its registers. Group g of a batch has the angles of g % S. A gate of minus
// infinity has the weight 0. Rounded to Elem after each of these steps, as in the reference. Fused because candidates
// are M times as many as results: softmax and product would each write them back. Gates are read twice, the second
// time soon after the first.
const int lane = thread_index_in_simdgroup;
const size_t g = threadgroup_position_in_grid.y;
const size_t angles = g % static_cast<size_t>(cosines_shape[0]) * (P / 2);

threadgroup float pooled[K];

for (int d = 2 * thread_position_in_threadgroup.x; d < K; d += 2 * THREADS) {
    const size_t first = g * M * K + d;
    float2 top = float2(-INFINITY);
    for (int m = 0; m < M; m++) {
        top = metal::max(top, float2(gate[first + m * K], gate[first + m * K + 1]));
    }
    float2 total = float2(0.0f);
    float2 sum = float2(0.0f);
    for (int m = 0; m < M; m++) {
        const size_t at = first + m * K;
        const float2 e = float2(metal::precise::exp(gate[at] - top.x), metal::precise::exp(gate[at + 1] - top.y));
        total += e;
        sum += e * float2(kv[at], kv[at + 1]);
    }
    const float2 mean = rounded<Elem>(sum / total);
    pooled[d] = mean.x;
    pooled[d + 1] = mean.y;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// The whole simdgroup takes this branch, so all its lanes meet in what follows.
if (simdgroup_index_in_threadgroup == 0) {
    float2 row[(K + 63) / 64];
    load_row<K>(row, pooled, lane);
    const float norm = inverse_rms<K>(row, eps[0]);
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const int d = 2 * (i * 32 + lane);
        if (d < K) {
            const float2 w = float2(static_cast<float>(weight[d]), static_cast<float>(weight[d + 1]));
            row[i] = rounded<Elem>(row[i] * norm * w);
        }
    }
    rotate_row<Elem, K, P>(row, cosines + angles, sines + angles, lane);
    if (QUANT == 1) {
        store_fp8_row<Elem, K, P, BYTES>(out, g, row, lane);
    } else if (QUANT == 2) {
        hadamard<K>(row, lane);
        #pragma clang loop unroll(full)
        for (int i = 0; i < (K + 63) / 64; i++) {
            row[i] = rounded<Elem>(row[i]);
        }
        store_fp4_row<Elem, K, BYTES>(out, g, row, lane);
    } else {
        store_row<K>(out + g * K, row, lane);
    }
}
