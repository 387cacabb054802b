// out[t, h] = sum over s of p[t, h, s] * row[s],  p = softmax over s and sink[h] of scale * q[t, h] . row[s],
// its last P values rotated back by the angles of t
//
// Grid (32 * SIMDS, splits, tokens * GROUPS). A threadgroup takes HEADS * SIMDS heads of a token and one split of its
// keys, TILE rows at a time, which it reads once into threadgroup memory for all these heads. Each simdgroup has HEADS
// heads, in the registers of its lanes. Within a tile, lane r holds the logits of row r.
//
// The softmax is taken as the keys come: relative to the largest logit so far, the sink being the first of split 0,
// and what was added is scaled down when a larger one comes. Probabilities are rounded to Elem before they meet the
// values, their sum is not, as in the reference; there they are divided by the sum first. Either way a term is off by
// at most half a last place of Elem, so the two differ by at most two such halves of each term, and not at all in
// float32; what float16 loses because it is small is no more here than there, as the divisor is at least 1.
// With one split, FINAL, the result is complete; else out holds the sums of each split, and stats their largest logit
// and their denominator, for attention_combine.
// BYTES: of a packed row, see attention_row.metal; 0 for one of Elem.
//
// A row is read only if the query may see it: rows of open groups, and row 0 for a pick of -1, may hold anything.
// Fused because logits and probabilities are H times the keys, and picked rows would be copied for each query.
constexpr int PAIRS = (K + 63) / 64;  // of a row in a lane
constexpr int GROUPS = (H + HEADS * SIMDS - 1) / (HEADS * SIMDS);
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;

threadgroup vec<Elem, 2> tile[TILE * PAIRS * 32];

const size_t token = threadgroup_position_in_grid.z / GROUPS;
const int head = (threadgroup_position_in_grid.z % GROUPS * SIMDS + simd) * HEADS;
const int split = threadgroup_position_in_grid.y;
const int splits = threadgroups_per_grid.y;

// The keys of this query: first those of the window, then compressed ones.
const int T = q_shape[1];
const int t = token % T;
const int last = window_shape[1] - T + t + 1;
const int first = max(0, last - sizes[2]);
const int recent = last - first;
const int count = recent + (PICKED ? sizes[3] : min(sizes[3], (sizes[0] + t + 1) / sizes[1]));
const int share = ((count + splits - 1) / splits + TILE - 1) / TILE * TILE;
const int stop = min(count, (split + 1) * share);
const size_t window_base = token / T * static_cast<size_t>(window_shape[1]);
const size_t rows_base = token / T * static_cast<size_t>(rows_shape[1]);

Elem query[HEADS][2 * PAIRS];
float2 sums[HEADS][PAIRS];
float largest[HEADS];
float total[HEADS];
#pragma clang loop unroll(full)
for (int h = 0; h < HEADS; h++) {
    const int own = min(head + h, H - 1);  // beyond the last it computes what that does, and writes nothing
    load_query<K>(query[h], q, (token * H + own) * K, lane);
    for (int i = 0; i < PAIRS; i++) {
        sums[h][i] = float2(0.0f);
    }
    // Not infinity: of two of them there is no difference.
    const float first_logit = split == 0 ? static_cast<float>(sink[own]) : -INFINITY;
    largest[h] = max(first_logit, -FLT_MAX);
    total[h] = metal::precise::exp(first_logit - largest[h]);
}

for (int start = split * share; start < stop; start += TILE) {
    int row = -1;
    if (lane < TILE && start + lane < stop) {
        const int key = start + lane;
        row = key < recent ? first + key : key - recent;
        if (PICKED && key >= recent) {
            row = picks[token * static_cast<size_t>(sizes[3]) + row];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int r = simd; r < TILE; r += SIMDS) {
        const int here = simd_shuffle(row, r);
        if (here >= 0 && start + r < recent) {
            stage_row<Elem, K, P, BYTES>(tile + r * PAIRS * 32, window, window_base + here, lane);
        } else if (here >= 0) {
            stage_row<Elem, K, P, BYTES>(tile + r * PAIRS * 32, rows, rows_base + here, lane);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float logits[HEADS];
    #pragma clang loop unroll(full)
    for (int h = 0; h < HEADS; h++) {
        logits[h] = -INFINITY;
    }
    for (int r = 0; r < TILE; r++) {
        if (simd_shuffle(row, r) >= 0) {
            #pragma clang loop unroll(full)
            for (int h = 0; h < HEADS; h++) {
                const float dot = simd_sum(dot_row<K, Elem>(query[h], tile + r * PAIRS * 32, lane));
                logits[h] = lane == r ? dot * scale[0] : logits[h];
            }
        }
    }
    #pragma clang loop unroll(full)
    for (int h = 0; h < HEADS; h++) {
        const float before = largest[h];
        largest[h] = max(before, simd_max(logits[h]));
        const float p = metal::precise::exp(logits[h] - largest[h]);
        const float kept = metal::precise::exp(before - largest[h]);
        total[h] = total[h] * kept + simd_sum(p);
        scale_row<K>(sums[h], kept);
        logits[h] = static_cast<float>(static_cast<Elem>(p));  // from here on, probabilities
    }
    for (int r = 0; r < TILE; r++) {
        if (simd_shuffle(row, r) >= 0) {
            #pragma clang loop unroll(full)
            for (int h = 0; h < HEADS; h++) {
                add_row<K, Elem>(sums[h], simd_shuffle(logits[h], r), tile + r * PAIRS * 32, lane);
            }
        }
    }
}

#pragma clang loop unroll(full)
for (int h = 0; h < HEADS; h++) {
    if (head + h < H) {
        const size_t at = (token * splits + split) * H + head + h;
        if (FINAL) {
            scale_row<K>(sums[h], 1.0f / total[h]);
            rotate_row_back<Elem, K, P>(sums[h], cosines + t * (P / 2), sines + t * (P / 2), lane);
        }
        store_row<K>(out + at * K, sums[h], lane);
        if (lane == 0) {
            stats[2 * at] = largest[h];
            stats[2 * at + 1] = total[h];
        }
    }
}
