// y[p, f] = weight[p] * silu(min(g, limit)) * clip(u, -limit, limit) with g = w1[e, f] . x[t], u = w3[e, f] . x[t] and
// t = token[p], e = expert[p]: expert_gate_up for many pairs, sorted by expert
//
// Grid (128 * row groups, slots). A threadgroup takes up to 32 pairs of one expert, found from the offsets of the
// experts, and 32 rows f of both matrices, which are the 64 rows of its tiles; a slot without pairs reads no weights.
// A simdgroup has 16 pairs and 16 rows of each matrix, so that g and u of a pair and row are in the same lane. Sums are
// in float, in an order that depends on D alone; g and u are rounded to Elem before the activation, which is in float,
// and the result once after the weight, as in the reference. Comparisons, not min and clamp, which may lose NaN.
// Fused because g and u would be written and read back, and x be gathered, each in a launch of its own. The experts of
// a layer hold more than 2^31 bytes: offsets are 64-bit.
constexpr int STRIDE = tile_stride<Tile>();
const int me = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int3 found = find_tile<E>(offsets, threadgroup_position_in_grid.y);
const int first = threadgroup_position_in_grid.x * 32;

threadgroup Tile xs[TILE_PAIRS * STRIDE];
threadgroup Tile ws[64 * STRIDE];

// What this thread brings: a quarter of a pair's columns, and a block of a row of w1 or w3.
const bool own = me / 4 < found.z;
const device Elem* values = x + (own ? static_cast<size_t>(token[found.y + me / 4]) * D : 0) + me % 4 * 16;
const size_t row = static_cast<size_t>(found.x) * F + metal::min(first + me / 2 % 32, F - 1);

simdgroup_float8x8 sums[8];
#pragma clang loop unroll(full)
for (int i = 0; i < 8; i++) {
    sums[i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
}
for (int start = 0; start < (found.z > 0 ? D : 0); start += TILE_COLUMNS) {
    const int block = start / 32 + me % 2;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage_values(xs + me / 4 * STRIDE + me % 4 * 16, values + start, own && start + me % 4 * 16 < D);
    threadgroup Tile* target = ws + me / 2 * STRIDE + me % 2 * 32;
    if (me < 64) {
        stage_block<BITS>(target, w1, s1, row * (D / 32) + block, block < D / 32);
    } else {
        stage_block<BITS>(target, w3, s3, row * (D / 32) + block, block < D / 32);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    add_products(sums, xs + simd / 2 * 16 * STRIDE, ws + simd % 2 * 16 * STRIDE);
}

#pragma clang loop unroll(full)
for (int i = 0; i < 8; i++) {
    const int pair = simd / 2 * 16 + i / 4 * 8 + matrix_row(lane);
    if (i % 4 < 2 && pair < found.z) {
        #pragma clang loop unroll(full)
        for (int k = 0; k < 2; k++) {
            const int f = first + simd % 2 * 16 + i % 4 * 8 + matrix_column(lane) + k;
            float g = static_cast<float>(static_cast<Elem>(pair_of(sums[i])[k]));
            float u = static_cast<float>(static_cast<Elem>(pair_of(sums[i + 2])[k]));
            g = g > limit[0] ? limit[0] : g;
            u = u > limit[0] ? limit[0] : u < -limit[0] ? -limit[0] : u;
            const float h = g / (1.0f + metal::precise::exp(-g)) * u;
            if (f < F) {
                y[static_cast<size_t>(found.y + pair) * F + f] = static_cast<Elem>(h * weight[found.y + pair]);
            }
        }
    }
}
