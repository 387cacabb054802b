// y[t, m] = sum over k of x[t, k] * weight[m, k], everything in float
//
// Grid (32, SHARES, row groups times tiles of TOKENS tokens), a threadgroup is 32 by SHARES by SLOTS: for each of SLOTS
// groups of ROWS rows m, SHARES simdgroups share the columns. Lanes take four neighbouring columns each, so that a
// simdgroup reads a row without gaps, and use them for all tokens of the tile; the tiles of a row are neighbours. A
// few long rows (the router) need SHARES to occupy the GPU, many rows (the head) do not. fma is explicit and the
// order depends on K and M alone: a token's sums do not depend on the tokens beside it.
// The reference widens the weight first, which writes and reads a copy of it in float; here it is read as it is.
const int lane = thread_index_in_simdgroup;
const int share = thread_position_in_threadgroup.y;
const int slot = thread_position_in_threadgroup.z;
const int T = x_shape[0];
const int tiles = (T + TOKENS - 1) / TOKENS;
const int first_token = threadgroup_position_in_grid.z % tiles * TOKENS;
const int first = (threadgroup_position_in_grid.z / tiles * SLOTS + slot) * ROWS;

threadgroup float partial[SLOTS][ROWS][TOKENS][SHARES];

// Loops over registers are unrolled by order: an array indexed at run time would live in memory.
float sums[ROWS][TOKENS] = {};
for (int k = (share * 32 + lane) * 4; k < K; k += SHARES * 128) {
    float4 values[TOKENS];
    #pragma clang loop unroll(full)
    for (int t = 0; t < TOKENS; t++) {
        const size_t token = metal::min(first_token + t, T - 1);
        values[t] = float4(*reinterpret_cast<const device vec<Elem, 4>*>(x + token * K + k));
    }
    #pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
        const size_t row = metal::min(first + r, M - 1);
        const float4 w = float4(*reinterpret_cast<const device vec<Weight, 4>*>(weight + row * K + k));
        #pragma clang loop unroll(full)
        for (int t = 0; t < TOKENS; t++) {
            sums[r][t] = metal::fma(w.x, values[t].x, sums[r][t]);
            sums[r][t] = metal::fma(w.y, values[t].y, sums[r][t]);
            sums[r][t] = metal::fma(w.z, values[t].z, sums[r][t]);
            sums[r][t] = metal::fma(w.w, values[t].w, sums[r][t]);
        }
    }
}

#pragma clang loop unroll(full)
for (int r = 0; r < ROWS; r++) {
    #pragma clang loop unroll(full)
    for (int t = 0; t < TOKENS; t++) {
        const float sum = simd_sum(sums[r][t]);
        if (lane == 0) {
            partial[slot][r][t][share] = sum;
        }
    }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const int row = first + lane / TOKENS;
const int token = first_token + lane % TOKENS;
if (share == 0 && lane < ROWS * TOKENS && row < M && token < T) {
    float total = 0.0f;
    for (int i = 0; i < SHARES; i++) {
        total += partial[slot][lane / TOKENS][lane % TOKENS][i];
    }
    y[static_cast<size_t>(token) * M + row] = total;
}
