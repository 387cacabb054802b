// y[t, d] = sum over a of w2[expert[t, a], d] . h[t, a], each product rounded to Elem
//
// Grid (32, A, row groups times tokens), a threadgroup is 32 by A: one simdgroup per expert for ROWS rows d. The
// products are made as in expert_down. Lane r rounds the product of row r to Elem; after the barrier the first
// simdgroup adds those of the A experts in order, in float, as the reference does.
// Fused because the products would be written, read back and added by another launch. Every group still reads weights
// that no other reads, so it costs no traffic.
// The experts of a layer hold more than 2^31 bytes: offsets are 64-bit.
const int lane = thread_index_in_simdgroup;
const int a = thread_position_in_threadgroup.y;
const int groups = (D + ROWS - 1) / ROWS;
const size_t token = threadgroup_position_in_grid.z / groups;
const int first = threadgroup_position_in_grid.z % groups * ROWS;
const size_t pair = token * A + a;
const size_t expert_start = static_cast<size_t>(expert[pair]) * D;

threadgroup float products[A][ROWS];

float sums[ROWS] = {};
for (int block = lane; block < F / 32; block += 32) {
    float values[32];
    load_block(values, h + pair * F + block * 32);
    #pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
        const size_t row = expert_start + metal::min(first + r, D - 1);
        add_block<BITS>(sums[r], w2, s2, row * (F / 32) + block, values);
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
    for (int i = 0; i < A; i++) {
        total += products[i][lane];
    }
    y[token * D + first + lane] = total;
}
