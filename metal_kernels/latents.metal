// latent[t] = q[t] / sqrt(mean(q[t]^2) + eps) * q_weight
// out[t] = kv[t] / sqrt(mean(kv[t]^2) + eps) * kv_weight, its last P values rotated by the angles of t, and with FP8 the
// K - P others rounded to e4m3 in blocks of 64
// BYTES: of a packed row, written as pack.metal says; 0 for one of Elem
//
// Grid (32, 2 * rows): the first simdgroup of a threadgroup has the latent of a token, the second its row; nothing is
// shared. Row r of a batch is token r % T. Rounded to Elem after the norm, after the rotation and after the round trip,
// as in the reference. Fused because both are small: each is read once and stays in registers, and would otherwise be
// a launch that has nothing to do but wait for the same product.
const int lane = thread_index_in_simdgroup;
const size_t r = thread_position_in_grid.y / 2;

// The whole simdgroup takes one branch, so all its lanes meet in what follows.
if (thread_position_in_grid.y % 2 == 0) {
    float2 row[(Q + 63) / 64];
    load_row<Q>(row, q + r * Q, lane);
    weigh_row<Elem, Q>(row, q_weight, inverse_rms<Q>(row, eps[0]), lane);
    store_row<Q>(latent + r * Q, row, lane);
} else {
    const size_t angles = r % static_cast<size_t>(cosines_shape[0]) * (P / 2);
    float2 row[(K + 63) / 64];
    load_row<K>(row, kv + r * K, lane);
    weigh_row<Elem, K>(row, kv_weight, inverse_rms<K>(row, eps[0]), lane);
    rotate_row<Elem, K, P>(row, cosines + angles, sines + angles, lane);
    if (FP8) {
        store_fp8_row<Elem, K, P, BYTES>(out, r, row, lane);
    } else {
        store_row<K>(out + r * K, row, lane);
    }
}
