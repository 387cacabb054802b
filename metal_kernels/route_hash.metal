// weights[t, a] = s[ids[t, a]] / (sum over a of s[ids[t, a]]) * scale, s = route_score(logits[t])
//
// Grid (32, T), one simdgroup per token, up to 8 to a threadgroup; nothing is shared, so the last threadgroup may have
// fewer. Lane a has place a; an expert that comes twice is two terms of the sum. Fused because only A of the E scores
// are needed.
const int lane = thread_index_in_simdgroup;
const size_t token = thread_position_in_grid.y;

float chosen = 0.0f;
if (lane < A) {
    chosen = route_score(logits[token * E + ids[token * A + lane]]);
}
const float total = simd_sum(chosen);
if (lane < A) {
    weights[token * A + lane] = chosen / total * scale[0];
}
