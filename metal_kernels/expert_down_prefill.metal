// y[p, d] = w2[e, d] . h[p] with e = expert[p]: expert_down for many pairs, sorted by expert
//
// Grid (128 * row groups, slots). A threadgroup takes up to 32 pairs of one expert, found from the offsets of the
// experts, and 64 rows d; a slot without pairs reads no weights. A simdgroup has 16 pairs and 32 rows. Sums are in
// float, in an order that depends on F alone, and rounded to Elem once, as in the reference.
// The experts of a layer hold more than 2^31 bytes: offsets are 64-bit.
constexpr int STRIDE = tile_stride<Tile>();
const int me = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int3 found = find_tile<E>(offsets, threadgroup_position_in_grid.y);
const int first = threadgroup_position_in_grid.x * 64;

threadgroup Tile xs[TILE_PAIRS * STRIDE];
threadgroup Tile ws[64 * STRIDE];

// What this thread brings: a quarter of a pair's columns, and a block of a row.
const bool own = me / 4 < found.z;
const device Elem* values = h + (own ? static_cast<size_t>(found.y + me / 4) * F : 0) + me % 4 * 16;
const size_t row = static_cast<size_t>(found.x) * D + metal::min(first + me / 2, D - 1);

simdgroup_float8x8 sums[8];
#pragma clang loop unroll(full)
for (int i = 0; i < 8; i++) {
    sums[i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
}
for (int start = 0; start < (found.z > 0 ? F : 0); start += TILE_COLUMNS) {
    const int block = start / 32 + me % 2;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage_values(xs + me / 4 * STRIDE + me % 4 * 16, values + start, own && start + me % 4 * 16 < F);
    stage_block<BITS>(ws + me / 2 * STRIDE + me % 2 * 32, w2, s2, row * (F / 32) + block, block < F / 32);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    add_products(sums, xs + simd / 2 * 16 * STRIDE, ws + simd % 2 * 16 * STRIDE);
}

#pragma clang loop unroll(full)
for (int i = 0; i < 8; i++) {
    const int pair = simd / 2 * 16 + i / 4 * 8 + matrix_row(lane);
    const int d = first + i % 4 / 2 * 32 + simd % 2 * 16 + i % 2 * 8 + matrix_column(lane);
    if (pair < found.z) {
        device Elem* target = y + static_cast<size_t>(found.y + pair) * D;
        const float2 sum = pair_of(sums[i]);
        if (d < D) {
            target[d] = static_cast<Elem>(sum.x);
        }
        if (d + 1 < D) {
            target[d + 1] = static_cast<Elem>(sum.y);
        }
    }
}
