// Dimensions depth, depth + 1, ... of keys r, r + 1, ... in threadgroup memory as float, STRIDE values apart; 0 for what
// is beyond the dimensions, or beyond the `left` keys there are.
template <int J, int KEYS, int DEPTH, int STRIDE, int THREADS, int BYTES, typename Source>
inline void stage_keys(threadgroup float* target, Source keys, size_t r, int left, int depth, int thread_index) {
    for (int i = thread_index; i < KEYS * DEPTH; i += THREADS) {
        const int s = i / DEPTH;
        const int d = depth + i % DEPTH;
        const bool inside = s < left && d < J;
        target[s * STRIDE + i % DEPTH] = inside ? static_cast<float>(keys[(r + s) * J + d]) : 0.0f;
    }
}

// The same of packed keys (see pack.metal): a thread reads eight values at a time, which share a scale. Keys start at
// multiples of 4 bytes, and blocks of 32 dimensions at multiples of 4, so J and depth are multiples of 32.
template <int J, int KEYS, int DEPTH, int STRIDE, int THREADS, int BYTES>
inline void stage_keys(
    threadgroup float* target, const device uint8_t* keys, size_t r, int left, int depth, int thread_index) {
    for (int i = thread_index; i < KEYS * DEPTH / 8; i += THREADS) {
        const int s = i / (DEPTH / 8);
        const int d = i % (DEPTH / 8) * 8;
        const device uint8_t* key = keys + (r + s) * BYTES;
        uint word = 0u;
        uint exponent = 1u;
        if (s < left) {
            word = *reinterpret_cast<const device uint*>(key + (depth + d) / 2);
            exponent = key[J / 2 + (depth + d) / 32];
        }
        #pragma clang loop unroll(full)
        for (int pair = 0; pair < 4; pair++) {
            const float2 values = float2(e2m1_pair(word, pair));
            target[s * STRIDE + d + pair] = scaled<4>(values.x, exponent);
            target[s * STRIDE + d + pair + 4] = scaled<4>(values.y, exponent);
        }
    }
}
