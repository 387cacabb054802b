// out[t] = kv[t] / sqrt(mean(kv[t]^2) + eps) * weight, its last P values rotated by the angles of t, and with FP8 the
// K - P others rounded to e4m3 in blocks of 64
// BYTES: of a packed row, written as pack.metal says; 0 for one of Elem
//
// Grid (32, rows), one simdgroup per row, up to 8 to a threadgroup; nothing is shared, so the last threadgroup may have
// fewer. Row r of a batch is token r % T. Rounded to Elem after the norm, after the rotation and after the round trip,
// as in the reference. Fused because a row is small: it is read once and stays in registers.
const int lane = thread_index_in_simdgroup;
const size_t r = thread_position_in_grid.y;
const size_t angles = r % static_cast<size_t>(cosines_shape[0]) * (P / 2);

float2 row[(K + 63) / 64];
load_row<K>(row, kv + r * K, lane);
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
if (FP8) {
    store_fp8_row<Elem, K, P, BYTES>(out, r, row, lane);
} else {
    store_row<K>(out + r * K, row, lane);
}
