// y[t, d] = sum over a of w2[expert[t, a], d] . h[t * A + a] + shared_w2[d] . h[T * A + t], each product rounded to Elem
//
// Grid (32, A + 1, row groups times tokens), a threadgroup is 32 by A + 1: one simdgroup per expert for ROWS rows d,
// the last one for the shared expert, whose weights have a format of their own. The products are made as in
// expert_down. Lane r rounds the product of row r to Elem; after the barrier the first simdgroup adds those of the A
// experts in order, in float, then the shared one, and rounds once, as the reference does.
// Fused because the products would be written, read back and added by other launches. Every group still reads weights
// that no other reads, so it costs no traffic. Offsets are 64-bit.
const int lane = thread_index_in_simdgroup;
const int a = thread_position_in_threadgroup.y;
const int groups = (D + ROWS - 1) / ROWS;
const size_t token = threadgroup_position_in_grid.z / groups;
const int first = threadgroup_position_in_grid.z % groups * ROWS;
const size_t pair = a < A ? token * A + a : static_cast<size_t>(expert_shape[0]) * A + token;

threadgroup float products[A + 1][ROWS];

float sums[ROWS] = {};
for (int block = lane; block < F / 32; block += 32) {
    float values[32];
    load_block(values, h + pair * F + block * 32);
    if (a < A) {
        add_rows<ROWS, BITS, GROUP, AFFINE>(sums, w2, s2, b2, expert[pair], D, first, F / 32, block, values);
    } else {
        add_rows<ROWS, SHARED_BITS, SHARED_GROUP, SHARED_AFFINE>(
            sums, shared_w2, shared_s2, shared_b2, 0, D, first, F / 32, block, values);
    }
}

#pragma clang loop unroll(full)
for (int r = 0; r < ROWS; r++) {
    const float sum = simd_sum(sums[r]);
    if (lane == r) {
        products[a][r] = static_cast<float>(static_cast<Elem>(sum));
    }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (a == 0 && lane < ROWS && first + lane < D) {
    float total = 0.0f;
    for (int i = 0; i <= A; i++) {
        total += products[i][lane];
    }
    y[token * D + first + lane] = static_cast<Elem>(total);
}
