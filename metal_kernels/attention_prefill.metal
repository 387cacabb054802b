// out[t, h] = sum over s of p[t, h, s] * row[s],  p = softmax over s and sink[h] of scale * q[t, h] . row[s],
// its last P values rotated back by the angles of t: sparse_attention for many tokens, with 8 x 8 matrices
//
// Grid (32 * SIMDS, head groups, tokens). A threadgroup takes 4 * SIMDS heads of one token, and the keys that the
// token sees, TILE at a time, which it reads once into threadgroup memory. All heads share the keys, so a tile of
// heads reads each key as seldom as one of heads and tokens of the same size would, and needs no mask between tokens.
// A simdgroup has 16 heads and a quarter of each row: of its part of the queries and sums, which stay in registers,
// and of the keys, which are also the values. The four parts of a logit meet in threadgroup memory; each of the four
// simdgroups then takes the same softmax for itself, which saves a barrier.
//
// Softmax, roundings and BYTES are those of sparse_attention.metal; only the order of sums differs. A row is read only
// if the query may see it, and is zeros otherwise: 0 times what lay there might be NaN.
// Fused because logits and probabilities are H times the keys, and picked rows would be copied for each query.
constexpr int SLICES = 4;
constexpr int PARTS = (K + 63) / 64 * 2;  // matrices beside each other in a slice
constexpr int STRIDE = SLICES * PARTS * 8 + 16 / sizeof(Elem);  // of keys: 8 of them start in different banks
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;
const int block = simd / SLICES * 2;  // of 8 heads
const int column = simd % SLICES * PARTS * 8 + matrix_column(lane);

threadgroup vec<Elem, 2> tile[TILE * STRIDE / 2];
threadgroup float2 parts[SLICES][SIMDS / SLICES * 2][TILE / 8][32];
const threadgroup Elem* keys = reinterpret_cast<const threadgroup Elem*>(tile) + simd % SLICES * PARTS * 8;

const size_t token = threadgroup_position_in_grid.z;
const int head = threadgroup_position_in_grid.y * 4 * SIMDS + block * 8 + matrix_row(lane);

// The keys of this query: first those of the window, then compressed ones.
const int T = q_shape[1];
const int t = token % T;
const int last = window_shape[1] - T + t + 1;
const int first = max(0, last - sizes[2]);
const int recent = last - first;
const int count = recent + (PICKED ? sizes[3] : min(sizes[3], (sizes[0] + t + 1) / sizes[1]));
const size_t window_base = token / T * static_cast<size_t>(window_shape[1]);
const size_t rows_base = token / T * static_cast<size_t>(rows_shape[1]);

simdgroup_matrix<Elem, 8, 8> query[2][PARTS];
simdgroup_float8x8 sums[2][PARTS];
float largest[2];
float total[2];  // the share of this lane
#pragma clang loop unroll(full)
for (int b = 0; b < 2; b++) {
    const int own = min(head + 8 * b, H - 1);  // beyond the last it computes what that does, and writes nothing
    const size_t at = (token * H + own) * K + column;
    #pragma clang loop unroll(full)
    for (int i = 0; i < PARTS; i++) {
        pair_of(query[b][i]) = load_pair<Elem>(q, at + 8 * i, column + 8 * i < K);
        pair_of(sums[b][i]) = float2(0.0f);
    }
    const float first_logit = static_cast<float>(sink[own]);
    largest[b] = max(first_logit, -FLT_MAX);  // not infinity: of two of them there is no difference
    total[b] = matrix_column(lane) == 0 ? metal::precise::exp(first_logit - largest[b]) : 0.0f;
}

for (int start = 0; start < count; start += TILE) {
    const int key = start + lane;
    int row = key < recent ? first + key : key - recent;
    row = lane >= TILE || key >= count ? -1 : PICKED && key >= recent ? picks[token * sizes[3] + row] : row;
    if (!simd_any(row >= 0)) {
        continue;  // as all simdgroups do
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int r = simd; r < TILE; r += SIMDS) {
        const int here = simd_shuffle(row, r);
        threadgroup vec<Elem, 2>* target = tile + r * (STRIDE / 2);
        if (here < 0) {
            clear_row<K>(target, lane);
        } else if (start + r < recent) {
            stage_row<Elem, K, P, BYTES>(target, window, window_base + here, lane);
        } else {
            stage_row<Elem, K, P, BYTES>(target, rows, rows_base + here, lane);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (int j = 0; j < TILE / 8; j++) {
        simdgroup_float8x8 dots[2];
        dots[0] = dots[1] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        #pragma clang loop unroll(full)
        for (int i = 0; i < PARTS; i++) {
            simdgroup_matrix<Elem, 8, 8> key;
            simdgroup_load(key, keys + j * 8 * STRIDE + 8 * i, STRIDE, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(dots[0], query[0][i], key, dots[0]);
            simdgroup_multiply_accumulate(dots[1], query[1][i], key, dots[1]);
        }
        parts[simd % SLICES][block][j][lane] = pair_of(dots[0]);
        parts[simd % SLICES][block + 1][j][lane] = pair_of(dots[1]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    simdgroup_matrix<Elem, 8, 8> shares[2][TILE / 8];
    #pragma clang loop unroll(full)
    for (int b = 0; b < 2; b++) {
        float2 logits[TILE / 8];
        const float before = largest[b];
        #pragma clang loop unroll(full)
        for (int j = 0; j < TILE / 8; j++) {
            float2 dot = float2(0.0f);
            for (int s = 0; s < SLICES; s++) {
                dot += parts[s][block + b][j][lane];
            }
            const int left = 8 * j + matrix_column(lane);
            logits[j].x = simd_shuffle(row, left) >= 0 ? dot.x * scale[0] : -INFINITY;
            logits[j].y = simd_shuffle(row, left + 1) >= 0 ? dot.y * scale[0] : -INFINITY;
            largest[b] = max(largest[b], max(logits[j].x, logits[j].y));
        }
        largest[b] = row_max(largest[b]);
        const float kept = metal::precise::exp(before - largest[b]);
        total[b] *= kept;
        #pragma clang loop unroll(full)
        for (int j = 0; j < TILE / 8; j++) {
            const float x = metal::precise::exp(logits[j].x - largest[b]);
            const float y = metal::precise::exp(logits[j].y - largest[b]);
            total[b] += x + y;
            pair_of(shares[b][j]) = vec<Elem, 2>(static_cast<Elem>(x), static_cast<Elem>(y));
        }
        #pragma clang loop unroll(full)
        for (int i = 0; i < PARTS; i++) {
            pair_of(sums[b][i]) *= kept;
        }
    }
    #pragma clang loop unroll(full)
    for (int j = 0; j < TILE / 8; j++) {
        #pragma clang loop unroll(full)
        for (int i = 0; i < PARTS; i++) {
            simdgroup_matrix<Elem, 8, 8> value;
            simdgroup_load(value, keys + j * 8 * STRIDE + 8 * i, STRIDE);
            simdgroup_multiply_accumulate(sums[0][i], shares[0][j], value, sums[0][i]);
            simdgroup_multiply_accumulate(sums[1][i], shares[1][j], value, sums[1][i]);
        }
    }
}

#pragma clang loop unroll(full)
for (int b = 0; b < 2; b++) {
    const float inverse = 1.0f / row_sum(total[b]);
    device Elem* target = out + (token * H + head + 8 * b) * K;
    #pragma clang loop unroll(full)
    for (int i = 0; i < PARTS; i++) {
        const int d = column + 8 * i;
        if (head + 8 * b < H && d < K) {
            const float2 pair = pair_of(sums[b][i]) * inverse;
            const float2 turned = turned_back<Elem, K, P>(pair, d, cosines + t * (P / 2), sines + t * (P / 2));
            target[d] = static_cast<Elem>(turned.x);
            target[d + 1] = static_cast<Elem>(turned.y);
        }
    }
}
