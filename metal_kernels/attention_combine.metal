// out[t, h] = sum over j of e^(m[j] - M) * sums[j] / sum over j of e^(m[j] - M) * l[j],  M = largest of m,
// its last P values rotated back by the angles of t; j are the splits of the keys, m and l the stats of (t, j, h)
//
// Grid (32 * ceil(K / 64), H, tokens), a simdgroup for 32 pairs of a head; nothing is shared, so the last threadgroup
// may have fewer. Splits are added in order. A split without keys has the smallest m there is and adds 0.
const int lane = thread_index_in_simdgroup;
const int pair = thread_position_in_grid.x;
const size_t token = thread_position_in_grid.z;
const size_t head = thread_position_in_grid.y;
const int splits = sums_shape[1];
const size_t base = token * splits * H + head;  // of split 0

float largest = -FLT_MAX;
for (int j = lane; j < splits; j += 32) {
    largest = max(largest, stats[2 * (base + static_cast<size_t>(j) * H)]);
}
largest = simd_max(largest);
float total = 0.0f;
float2 sum = float2(0.0f);
for (int start = 0; start < splits; start += 32) {
    float weight = 0.0f;
    float share = 0.0f;
    if (start + lane < splits) {
        const size_t at = 2 * (base + static_cast<size_t>(start + lane) * H);
        weight = metal::precise::exp(stats[at] - largest);
        share = weight * stats[at + 1];
    }
    total += simd_sum(share);
    for (int j = start; j < min(start + 32, splits); j++) {
        const float factor = simd_shuffle(weight, j - start);
        if (2 * pair < K) {
            const size_t at = (base + static_cast<size_t>(j) * H) * K + 2 * pair;
            sum += factor * float2(sums[at], sums[at + 1]);
        }
    }
}
if (2 * pair < K) {
    const size_t at = (token * H + head) * K + 2 * pair;
    const size_t angles = token % static_cast<size_t>(cosines_shape[0]) * (P / 2);
    sum = turned_back<Elem, K, P>(sum * (1.0f / total), 2 * pair, cosines + angles, sines + angles);
    out[at] = static_cast<Elem>(sum.x);
    out[at + 1] = static_cast<Elem>(sum.y);
}
