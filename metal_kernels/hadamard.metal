// y[j] = K^-1/2 * sum over i of (-1)^(bits that i and j share) * x[i], of a row held as in row.metal; K is a power of
// two. Value d is bit 0 of a pair, bits 1 to 5 of the lane, and the rest of the register: one step for each bit, in
// the order and with the one product at the end of MLX's transform.
template <int K>
inline void hadamard(thread float2* row, int lane) {
    constexpr int OWNED = (K + 63) / 64;
    constexpr int PAIRS = K / 2;
    #pragma clang loop unroll(full)
    for (int i = 0; i < OWNED; i++) {
        row[i] = float2(row[i].x + row[i].y, row[i].x - row[i].y);
    }
    #pragma clang loop unroll(full)
    for (int apart = 1; apart < (PAIRS < 32 ? PAIRS : 32); apart *= 2) {
        #pragma clang loop unroll(full)
        for (int i = 0; i < OWNED; i++) {
            const float2 other = float2(
                simd_shuffle_xor(row[i].x, static_cast<ushort>(apart)),
                simd_shuffle_xor(row[i].y, static_cast<ushort>(apart)));
            row[i] = (lane & apart) != 0 ? other - row[i] : row[i] + other;
        }
    }
    #pragma clang loop unroll(full)
    for (int apart = 1; apart < OWNED; apart *= 2) {
        #pragma clang loop unroll(full)
        for (int i = 0; i < OWNED; i++) {
            if ((i & apart) == 0) {
                const float2 sum = row[i] + row[i + apart];
                row[i + apart] = row[i] - row[i + apart];
                row[i] = sum;
            }
        }
    }
    float scale = 1.0f;
    int left = K;
    for (; left > 2; left /= 4) {
        scale *= 0.5f;
    }
    scale *= left == 2 ? 0.70710678f : 1.0f;
    #pragma clang loop unroll(full)
    for (int i = 0; i < OWNED; i++) {
        row[i] *= scale;
    }
}
