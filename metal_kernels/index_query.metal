// out[t, h] = q[t, h] with its last P values rotated by the angles of t, and with FP4 Hadamard-transformed and rounded
// to e2m1 in blocks of 32
//
// Grid (32, rows), one simdgroup per head, up to 8 to a threadgroup; nothing is shared, so the last threadgroup may
// have fewer. Row r is head r % H of token r / H % T. The transform is taken in float; rounded to Elem after the
// rotation, after the transform and after the round trip, as in the reference. Fused because a head is small: it is
// read once and stays in registers, and the transform is made of shuffles.
const int lane = thread_index_in_simdgroup;
const size_t r = thread_position_in_grid.y;
const size_t angles = r / H % static_cast<size_t>(cosines_shape[0]) * (P / 2);

float2 row[(K + 63) / 64];
load_row<K>(row, q + r * K, lane);
rotate_row<Elem, K, P>(row, cosines + angles, sines + angles, lane);
if (FP4) {
    hadamard<K>(row, lane);
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        row[i] = fp4_round_trip(rounded<Elem>(row[i]));
    }
}
store_row<K>(out + r * K, row, lane);
