// Keys in threadgroup memory and the heads that meet them, pairs of a row spread over lanes as in row.metal.

// Two neighbours, or zeros
template <typename Elem, typename Source>
inline vec<Elem, 2> load_pair(Source source, size_t at, bool there) {
    const Elem zero = static_cast<Elem>(0.0f);
    return there ? vec<Elem, 2>(source[at], source[at + 1]) : vec<Elem, 2>(zero, zero);
}

// Pairs of row r from device memory; zeros behind it, so that the loops below need not ask.
template <typename Elem, int K, int P, int BYTES, typename Source>
inline void stage_row(threadgroup vec<Elem, 2>* target, Source source, size_t r, int lane) {
    const size_t at = r * K;
    for (int p = lane; p < (K + 63) / 64 * 32; p += 32) {
        target[p] = load_pair<Elem>(source, at + 2 * p, 2 * p < K);
    }
}

template <int K, typename Pair>
inline void clear_row(threadgroup Pair* target, int lane) {
    for (int p = lane; p < (K + 63) / 64 * 32; p += 32) {
        target[p] = Pair(0);
    }
}

// The same of a packed row (see pack.metal). Rows start at multiples of 8 bytes, and a lane reads 8 at a time.
template <typename Elem, int K, int P, int BYTES>
inline void stage_row(threadgroup vec<Elem, 2>* target, const device uint8_t* source, size_t r, int lane) {
    const device uint8_t* start = source + r * BYTES;
    for (int p = lane; p < (K - P) / 8; p += 32) {
        const uint2 eight = reinterpret_cast<const device uint2*>(start)[p];
        const uint exponent = start[K + P + p / 8];
        #pragma clang loop unroll(full)
        for (int i = 0; i < 2; i++) {
            const float2 even = float2(e4m3_pair(eight[i], 0));
            const float2 odd = float2(e4m3_pair(eight[i], 1));
            target[4 * p + 2 * i] = vec<Elem, 2>(
                static_cast<Elem>(scaled<8>(even.x, exponent)), static_cast<Elem>(scaled<8>(odd.x, exponent)));
            target[4 * p + 2 * i + 1] = vec<Elem, 2>(
                static_cast<Elem>(scaled<8>(even.y, exponent)), static_cast<Elem>(scaled<8>(odd.y, exponent)));
        }
    }
    for (int p = lane; p < P / 4; p += 32) {
        const vec<Elem, 4> four = reinterpret_cast<const device vec<Elem, 4>*>(start + K - P)[p];
        target[(K - P) / 2 + 2 * p] = four.xy;
        target[(K - P) / 2 + 2 * p + 1] = four.zw;
    }
    for (int p = K / 2 + lane; p < (K + 63) / 64 * 32; p += 32) {
        target[p] = vec<Elem, 2>(static_cast<Elem>(0.0f), static_cast<Elem>(0.0f));
    }
}

// A query in the type of the array, which takes half the registers of float.
template <int K, typename Elem, typename Source>
inline void load_query(thread Elem* query, Source source, size_t at, int lane) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const int d = 2 * (i * 32 + lane);
        query[2 * i] = d < K ? source[at + d] : static_cast<Elem>(0.0f);
        query[2 * i + 1] = d < K ? source[at + d + 1] : static_cast<Elem>(0.0f);
    }
}

// The share of this lane in query . row
template <int K, typename Elem>
inline float dot_row(const thread Elem* query, const threadgroup vec<Elem, 2>* row, int lane) {
    float dot = 0.0f;
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const vec<Elem, 2> pair = row[i * 32 + lane];
        dot += static_cast<float>(query[2 * i]) * static_cast<float>(pair.x);
        dot += static_cast<float>(query[2 * i + 1]) * static_cast<float>(pair.y);
    }
    return dot;
}

// sum = sum + weight * row
template <int K, typename Elem>
inline void add_row(thread float2* sum, float weight, const threadgroup vec<Elem, 2>* row, int lane) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const vec<Elem, 2> pair = row[i * 32 + lane];
        sum[i] += weight * float2(static_cast<float>(pair.x), static_cast<float>(pair.y));
    }
}

template <int K>
inline void scale_row(thread float2* row, float factor) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        row[i] *= factor;
    }
}

// To Elem, and the last P values rotated by minus the angle: a swapped pair, turned forward, is the pair turned back.
template <typename Elem, int K, int P, typename Table>
inline void rotate_row_back(thread float2* row, Table cosines, Table sines, int lane) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        row[i] = rounded<Elem>(row[i]).yx;
    }
    rotate_row<Elem, K, P>(row, cosines, sines, lane);
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        row[i] = row[i].yx;
    }
}
