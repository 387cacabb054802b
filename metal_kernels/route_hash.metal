// experts[t] = table[ids[t]]
// weights[t, a] = s[experts[t, a]] / (sum over a of s[experts[t, a]]) * scale, s = route_score(logits[t])
//
// Grid (32, T), one simdgroup per token, up to 8 to a threadgroup; nothing is shared, so the last threadgroup may have
// fewer. Lane a has place a; an expert that comes twice is two terms of the sum. Fused because only one row of the
// table and A of the E scores are needed. Offsets are 64-bit.
const int lane = thread_index_in_simdgroup;
const size_t token = thread_position_in_grid.y;

float chosen = 0.0f;
if (lane < A) {
    const int expert = table[static_cast<size_t>(ids[token]) * A + lane];
    experts[token * A + lane] = expert;
    chosen = route_score(logits[token * E + expert]);
}
const float total = simd_sum(chosen);
if (lane < A) {
    weights[token * A + lane] = chosen / total * scale[0];
}
