// y[p, d] = w2[e, d] . h[p] with e = expert[p]
//
// Grid (32, row groups, pairs), a threadgroup is 32 by some simdgroups. A simdgroup owns ROWS rows d; a lane takes
// every 32nd block of 32 columns and uses its part of h for all rows, so that neighbouring lanes read neighbouring
// words. Sums are in float, in an order that depends on F alone, and rounded to Elem once, as in the reference.
// Offsets are 64-bit.
const int lane = thread_index_in_simdgroup;
const int first = thread_position_in_grid.y * ROWS;
const size_t pair = thread_position_in_grid.z;

float sums[ROWS] = {};
for (int block = lane; block < F / 32; block += 32) {
    float values[32];
    load_block(values, h + pair * F + block * 32);
    add_rows<ROWS, BITS, GROUP, AFFINE>(sums, w2, s2, b2, expert[pair], D, first, F / 32, block, values);
}

float mine = 0.0f;
#pragma clang loop unroll(full)
for (int r = 0; r < ROWS; r++) {
    const float sum = simd_sum(sums[r]);
    mine = lane == r ? sum : mine;
}
if (lane < ROWS && first + lane < D) {
    y[pair * D + first + lane] = static_cast<Elem>(mine);
}
