// ids[t] = the A experts with the highest s[e] + bias[e], s = route_score(logits[t]); of equal ones the lower id
// weights[t, a] = s[ids[t, a]] / (sum over a of s[ids[t, a]]) * scale
//
// Grid (32, T), one simdgroup per token, up to 8 to a threadgroup; nothing is shared, so the last threadgroup may have
// fewer. Lane l ranks the experts l, l + 32, ... and, at the end, writes place l. Sums are ranked by their bits, in the
// order of integers: every place gets another expert, whatever the numbers are. NaN comes last, as in the reference.
// Must stay equal to the reference: the set of experts, and the bias not in the weights. Fused because each of these
// steps on E numbers would be a launch.
constexpr int OWNED = (E + 31) / 32;
const int lane = thread_index_in_simdgroup;
const size_t token = thread_position_in_grid.y;

float score[OWNED];
uint rank[OWNED];  // 0: taken, or beyond the last expert
#pragma clang loop unroll(full)
for (int i = 0; i < OWNED; i++) {
    const int e = i * 32 + lane;
    score[i] = 0.0f;
    rank[i] = 0u;
    if (e < E) {
        score[i] = route_score(logits[token * E + e]);
        const float sum = score[i] + bias[e];
        const uint bits = as_type<uint>(sum);
        const uint ordered = (bits & 0x80000000u) != 0u ? ~bits : bits | 0x80000000u;
        rank[i] = (bits & 0x7fffffffu) > 0x7f800000u ? 1u : ordered;
    }
}

int expert = 0;
float chosen = 0.0f;
for (int a = 0; a < A; a++) {
    uint best = rank[0];
    int id = lane;
    float s = score[0];
    #pragma clang loop unroll(full)
    for (int i = 1; i < OWNED; i++) {
        if (rank[i] > best) {
            best = rank[i];
            id = i * 32 + lane;
            s = score[i];
        }
    }
    const uint top = simd_max(best);
    const int first = simd_min(best == top ? id : E);
    s = simd_shuffle(s, static_cast<ushort>(first % 32));
    #pragma clang loop unroll(full)
    for (int i = 0; i < OWNED; i++) {
        rank[i] = i * 32 + lane == first ? 0u : rank[i];
    }
    if (lane == a) {
        expert = first;
        chosen = s;
    }
}
const float total = simd_sum(chosen);
if (lane < A) {
    ids[token * A + lane] = expert;
    weights[token * A + lane] = chosen / total * scale[0];
}
