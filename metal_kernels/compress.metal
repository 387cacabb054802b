// e[s, c] = sum over m of softmax_m(gate[s, m, c]) * kv[s, m, c], channel by channel, over the tokens m of group s; then
// out[s] = e[s] / sqrt(mean(e[s]^2) + eps) * weight, its last P values rotated by the angles of s, and
// QUANT 1: the K - P others rounded to e4m3 in blocks of 64; QUANT 2: all transformed and rounded to e2m1, blocks of 32
// BYTES: of a packed row, written as pack.metal says; 0 for one of Elem
//
// A row of `tokens` has WIDTH values; kv is at KV of it, gate at GATE, to which ape[token in the group] is added. With
// M = 2 R groups overlap: the first R candidates are the first halves of the group before, the others the second halves
// of the group itself. Rows of tokens go round, so that the ring of a decode step is read as it is.
//
// Grid (THREADS, groups of tokens), one threadgroup per group. A thread pools pairs of channels, candidates in order;
// then the first simdgroup has the row in its registers. Group g of a batch has the angles of g % S. Rounded to Elem
// after each of these steps, as in the reference. Fused because candidates are M times as many as results: softmax and
// product would each write them back. Gates are read twice, the second time soon after the first.
const int lane = thread_index_in_simdgroup;
const size_t g = threadgroup_position_in_grid.y;
const int S = cosines_shape[0];
const int s = g % S;
const size_t angles = static_cast<size_t>(s) * (P / 2);
const int n = tokens_shape[1];
const size_t base = g / S * n;
// The candidate 0 of this group; n more than where it is, since it may lie before the first row.
const int first = place[0] + s * R - (M - R) + n;
const int absent = s == 0 && place[1] == 0 ? M - R : 0;  // there is no group before the first

threadgroup float pooled[K];

for (int d = 2 * thread_position_in_threadgroup.x; d < K; d += 2 * THREADS) {
    float2 top = float2(-INFINITY);
    for (int m = absent; m < M; m++) {
        const size_t at = (base + (first + m) % n) * WIDTH + GATE + d + m / R * K;
        const int bias = m % R * (M / R) * K + d + m / R * K;
        top = metal::max(top, float2(tokens[at] + ape[bias], tokens[at + 1] + ape[bias + 1]));
    }
    float2 total = float2(0.0f);
    float2 sum = float2(0.0f);
    for (int m = absent; m < M; m++) {
        const size_t at = (base + (first + m) % n) * WIDTH + d + m / R * K;
        const int bias = m % R * (M / R) * K + d + m / R * K;
        const float2 gate = float2(tokens[at + GATE] + ape[bias], tokens[at + GATE + 1] + ape[bias + 1]);
        const float2 e = float2(metal::precise::exp(gate.x - top.x), metal::precise::exp(gate.y - top.y));
        total += e;
        sum += e * float2(tokens[at + KV], tokens[at + KV + 1]);
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
    weigh_row<Elem, K>(row, weight, inverse_rms<K>(row, eps[0]), lane);
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
