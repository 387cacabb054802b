// out[t, h] = q[t, h] / sqrt(mean(q[t, h]^2) + eps), its last P values rotated by the angles of t
//
// Grid (32, rows), one simdgroup per head, up to 8 to a threadgroup; nothing is shared, so the last threadgroup may
// have fewer. Row r is head r % H of token r / H % T. Rounded to Elem after the norm and after the rotation, as in the
// reference. Fused because a head is small: it is read once and stays in registers.
const int lane = thread_index_in_simdgroup;
const size_t r = thread_position_in_grid.y;
const size_t angles = r / H % static_cast<size_t>(cosines_shape[0]) * (P / 2);

float2 row[(K + 63) / 64];
load_row<K>(row, q + r * K, lane);
const float norm = inverse_rms<K>(row, eps[0]);
#pragma clang loop unroll(full)
for (int i = 0; i < (K + 63) / 64; i++) {
    row[i] = rounded<Elem>(row[i] * norm);
}
rotate_row<Elem, K, P>(row, cosines + angles, sines + angles, lane);
store_row<K>(out + r * K, row, lane);
