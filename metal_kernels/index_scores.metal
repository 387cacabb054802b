// scores[t, s] = sum over i of w[t, i] * relu(q[t, i] . keys[s])
//
// Grid (32 * SIMDS, tiles of 16 * SIMDS keys, tokens). A threadgroup multiplies all heads of a token with its keys as
// matrices of 8 x 8, a simdgroup the heads with 16 of the keys; DEPTH of the J dimensions lie in threadgroup memory at
// a time, converted to float, and what is beyond heads, keys and dimensions is 0. Heads beyond 8 * BLOCKS come in
// another round. The sum over the heads is again a product of matrices, with w in row 0 of the left one and 0 in the
// others. Which lane holds which element does not matter anywhere. Fused because the scores of the heads are I times
// the result. All sums are in float; another order than in the reference.
// BYTES: of a packed key, see index_keys.metal; 0 for one of the type of the queries.
constexpr int DEPTH = 32;
constexpr int STRIDE = DEPTH + 4;  // rows of a matrix begin in different banks
constexpr int HEADS = 8 * BLOCKS;
constexpr int KEYS = 16 * SIMDS;
constexpr int THREADS = 32 * SIMDS;
const int thread_index = thread_position_in_threadgroup.x;
const int simd = simdgroup_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;

threadgroup float queries[HEADS * STRIDE];
threadgroup float rows[KEYS * STRIDE];
threadgroup float weights[8 * HEADS];
threadgroup float sums[SIMDS * 128];

const size_t token = threadgroup_position_in_grid.z;
const int S = keys_shape[1];
const int first = threadgroup_position_in_grid.y * KEYS;
const size_t base = token / static_cast<size_t>(q_shape[1]) * static_cast<size_t>(S);  // row 0 of the batch row

simdgroup_float8x8 total[2];
#pragma clang loop unroll(full)
for (int n = 0; n < 2; n++) {
    total[n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
for (int head = 0; head < I; head += HEADS) {
    simdgroup_float8x8 dots[BLOCKS][2];
    #pragma clang loop unroll(full)
    for (int m = 0; m < BLOCKS; m++) {
        dots[m][0] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        dots[m][1] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    for (int depth = 0; depth < J; depth += DEPTH) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = thread_index; i < HEADS * DEPTH; i += THREADS) {
            const int h = head + i / DEPTH;
            const int d = depth + i % DEPTH;
            const bool inside = h < I && d < J;
            queries[i / DEPTH * STRIDE + i % DEPTH] = inside ? static_cast<float>(q[(token * I + h) * J + d]) : 0.0f;
        }
        stage_keys<J, KEYS, DEPTH, STRIDE, THREADS, BYTES>(rows, keys, base + first, S - first, depth, thread_index);
        for (int i = thread_index; i < 8 * HEADS; i += THREADS) {
            weights[i] = i < HEADS && head + i < I ? static_cast<float>(w[token * I + head + i]) : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int d = 0; d < DEPTH; d += 8) {
            simdgroup_float8x8 right[2];
            simdgroup_load(right[0], rows + simd * 16 * STRIDE + d, STRIDE, ulong2(0), true);
            simdgroup_load(right[1], rows + (simd * 16 + 8) * STRIDE + d, STRIDE, ulong2(0), true);
            #pragma clang loop unroll(full)
            for (int m = 0; m < BLOCKS; m++) {
                simdgroup_float8x8 left;
                simdgroup_load(left, queries + m * 8 * STRIDE + d, STRIDE);
                simdgroup_multiply_accumulate(dots[m][0], left, right[0], dots[m][0]);
                simdgroup_multiply_accumulate(dots[m][1], left, right[1], dots[m][1]);
            }
        }
    }
    #pragma clang loop unroll(full)
    for (int m = 0; m < BLOCKS; m++) {
        simdgroup_float8x8 left;
        simdgroup_load(left, weights + m * 8, HEADS);
        #pragma clang loop unroll(full)
        for (int n = 0; n < 2; n++) {
            #pragma clang loop unroll(full)
            for (int e = 0; e < 2; e++) {
                const float dot = dots[m][n].thread_elements()[e];
                dots[m][n].thread_elements()[e] = dot < 0.0f ? 0.0f : dot;  // NaN stays NaN
            }
            simdgroup_multiply_accumulate(total[n], left, dots[m][n], total[n]);
        }
    }
}
simdgroup_store(total[0], sums + simd * 128, 8);
simdgroup_store(total[1], sums + simd * 128 + 64, 8);
simdgroup_barrier(mem_flags::mem_threadgroup);
const int s = first + simd * 16 + lane;
if (lane < 16 && s < S) {
    scores[token * S + s] = sums[simd * 128 + lane / 8 * 64 + lane % 8];
}
