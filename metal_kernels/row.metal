// A row of K values, K even, in the registers of one simdgroup: lane l owns the pairs l, l + 32, ...; pair p is the
// values 2p and 2p + 1, so that a rotation stays within a lane. Pairs beyond the row are 0.
// Loops over registers are unrolled by order: an array indexed at run time would live in memory.
template <int K, typename Source>
inline void load_row(thread float2* row, Source source, int lane) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const int d = 2 * (i * 32 + lane);
        row[i] = d < K ? float2(static_cast<float>(source[d]), static_cast<float>(source[d + 1])) : float2(0.0f);
    }
}

template <int K, typename Elem>
inline void store_row(device Elem* target, const thread float2* row, int lane) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const int d = 2 * (i * 32 + lane);
        if (d < K) {
            target[d] = static_cast<Elem>(row[i].x);
            target[d + 1] = static_cast<Elem>(row[i].y);
        }
    }
}

// To the type of the array and back, wherever the reference stores a result.
template <typename Elem>
inline float2 rounded(float2 v) {
    return float2(static_cast<float>(static_cast<Elem>(v.x)), static_cast<float>(static_cast<Elem>(v.y)));
}

// 1 / sqrt(mean of the squares + eps)
template <int K>
inline float inverse_rms(const thread float2* row, float eps) {
    float squares = 0.0f;
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        squares += row[i].x * row[i].x + row[i].y * row[i].y;
    }
    return metal::precise::rsqrt(simd_sum(squares) / static_cast<float>(K) + eps);
}

// row * norm * weight, rounded to Elem
template <typename Elem, int K, typename Weight>
inline void weigh_row(thread float2* row, Weight weight, float norm, int lane) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const int d = 2 * (i * 32 + lane);
        if (d < K) {
            const float2 w = float2(static_cast<float>(weight[d]), static_cast<float>(weight[d + 1]));
            row[i] = rounded<Elem>(row[i] * norm * w);
        }
    }
}

// (a, b) -> (a cos - b sin, a sin + b cos) for the pairs of the last P values
template <typename Elem, int K, int P, typename Table>
inline void rotate_row(thread float2* row, Table cosines, Table sines, int lane) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const int pair = i * 32 + lane - (K - P) / 2;
        if (pair >= 0 && pair < P / 2) {
            const float c = cosines[pair];
            const float s = sines[pair];
            row[i] = rounded<Elem>(float2(row[i].x * c - row[i].y * s, row[i].x * s + row[i].y * c));
        }
    }
}

// The values d and d + 1 of an output in Elem, rotated by minus their angle if they are among the last P
template <typename Elem, int K, int P, typename Table>
inline float2 turned_back(float2 pair, int d, Table cosines, Table sines) {
    const float2 v = rounded<Elem>(pair);
    const int turned = (d - (K - P)) / 2;
    if (d < K - P) {
        return v;
    }
    const float c = cosines[turned];
    const float s = sines[turned];
    return rounded<Elem>(float2(v.x * c + v.y * s, v.y * c - v.x * s));
}
