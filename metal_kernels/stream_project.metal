// partial[t, r, s] = sum over the columns c of slice s of fn[r, c] * x[t, c], and in row r = M of x[t, c] * x[t, c]
//
// First of the two launches of stream_enter and stream_head: x[t] is one row of K = N * D columns.
// Grid (simdgroups * 32, slices, tiles of TOKENS tokens). A threadgroup owns COLUMNS columns of a tile, each of its
// simdgroups ROWS rows, a lane every 32nd column; row M, the token itself, gives the norm its sum of squares.
//
// Two launches, because fn is the largest thing read here (1.5 MB per sublayer at N = 4, D = 4096) and a token alone
// reads all of it. With one threadgroup per token it would pass through one core of the GPU while the others wait;
// cut into slices every core reads a part, for the price of a launch and of M + 1 floats per slice. In one launch
// the slices could only be added by whichever group comes last, which takes atomics.
// A tile keeps fn in registers for TOKENS tokens. Slices depend on K alone and fma is explicit, so a token's sums
// do not depend on the tokens beside it.
const int lane = thread_index_in_simdgroup;
const int first_row = simdgroup_index_in_threadgroup * ROWS;
const int slice = threadgroup_position_in_grid.y;
const int slices = threadgroups_per_grid.y;
const int first_token = threadgroup_position_in_grid.z * TOKENS;
const int T = x_shape[0];

// Loops over registers are unrolled by order: an array indexed at run time would live in memory.
float sums[ROWS][TOKENS] = {};

#pragma clang loop unroll(full)
for (int i = 0; i < COLUMNS; i += 32) {
    const int column = slice * COLUMNS + i + lane;
    const bool inside = K % COLUMNS == 0 || column < K;
    float values[TOKENS];
    #pragma clang loop unroll(full)
    for (int t = 0; t < TOKENS; t++) {
        const size_t token = metal::min(first_token + t, T - 1);
        values[t] = inside ? static_cast<float>(x[token * K + column]) : 0.0f;
    }
    #pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
        const int row = first_row + r;
        const float weight = inside && row < M ? fn[static_cast<size_t>(row) * K + column] : 0.0f;
        #pragma clang loop unroll(full)
        for (int t = 0; t < TOKENS; t++) {
            sums[r][t] = metal::fma(row < M ? weight : values[t], values[t], sums[r][t]);
        }
    }
}

#pragma clang loop unroll(full)
for (int r = 0; r < ROWS; r++) {
    #pragma clang loop unroll(full)
    for (int t = 0; t < TOKENS; t++) {
        const float sum = simd_sum(sums[r][t]);
        const int row = first_row + r;
        const int token = first_token + t;
        if (lane == 0 && row <= M && token < T) {
            partial[(static_cast<size_t>(token) * (M + 1) + row) * slices + slice] = sum;
        }
    }
}
