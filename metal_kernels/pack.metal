// Stores row r of an array, held as in row.metal and rounded as in rounding.metal: as Elem, or packed in BYTES bytes.
// Packed: codes of the rounded values, the P rotated ones as Elem, the E8M0 scales of the blocks, zeros. A block that
// holds infinity or NaN has the scale 255 and codes of 0, and is NaN when it is read.

// A number of the grid with so many bits after the leading one, as its code; its subnormals are below 2^(1 - BIAS).
template <int MANTISSA, int BIAS>
inline uint code_of(float q) {
    const uint bits = as_type<uint>(q);
    const uint size = bits & 0x7fffffffu;
    const uint steps = static_cast<uint>(metal::fabs(q) * static_cast<float>(1 << (MANTISSA + BIAS - 1)));
    const uint fields = (size >> (23 - MANTISSA)) - ((127u - BIAS) << MANTISSA);
    return (size < (128u - BIAS) << 23 ? steps : fields) | (bits >> 31 << (MANTISSA == 3 ? 7 : 3));
}

template <typename Elem, int K, int P, int BYTES>
inline void store_fp8_row(device Elem* out, size_t r, thread float2* row, int lane) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K - P) / 64; i++) {
        row[i] = fp8_round_trip(row[i]);
    }
    store_row<K>(out + r * K, row, lane);
}

template <typename Elem, int K, int P, int BYTES>
inline void store_fp8_row(device uint8_t* out, size_t r, thread float2* row, int lane) {
    device uint8_t* target = out + r * BYTES;
    device Elem* turned = reinterpret_cast<device Elem*>(target + K - P);
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const int pair = i * 32 + lane;
        if (i < (K - P) / 64) {
            const uint exponent = fp8_exponent(row[i]);
            const float2 q = exponent < 255u ? to_fp8(row[i], exponent) : float2(0.0f);
            const uint codes = code_of<3, 7>(q.x) | code_of<3, 7>(q.y) << 8;
            reinterpret_cast<device ushort*>(target)[pair] = static_cast<ushort>(codes);
            if (lane == 0) {
                target[K + P + i] = static_cast<uint8_t>(metal::min(exponent, 255u));
            }
        } else if (2 * pair < K) {
            turned[2 * pair - (K - P)] = static_cast<Elem>(row[i].x);
            turned[2 * pair - (K - P) + 1] = static_cast<Elem>(row[i].y);
        }
    }
    for (int at = K + P + (K - P) / 64 + lane; at < BYTES; at += 32) {
        target[at] = 0;
    }
}

template <typename Elem, int K, int BYTES>
inline void store_fp4_row(device Elem* out, size_t r, thread float2* row, int lane) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        row[i] = fp4_round_trip(row[i]);
    }
    store_row<K>(out + r * K, row, lane);
}

template <typename Elem, int K, int BYTES>
inline void store_fp4_row(device uint8_t* out, size_t r, thread float2* row, int lane) {
    device uint8_t* target = out + r * BYTES;
    #pragma clang loop unroll(full)
    for (int i = 0; i < (K + 63) / 64; i++) {
        const int pair = i * 32 + lane;
        const uint exponent = fp4_exponent(row[i]);
        const float2 q = exponent < 255u ? to_fp4(row[i], exponent) : float2(0.0f);
        if (2 * pair < K) {
            target[pair] = static_cast<uint8_t>(code_of<1, 1>(q.x) | code_of<1, 1>(q.y) << 4);
            if (lane % 16 == 0) {
                target[K / 2 + pair / 16] = static_cast<uint8_t>(metal::min(exponent, 255u));
            }
        }
    }
    for (int at = K / 2 + K / 32 + lane; at < BYTES; at += 32) {
        target[at] = 0;
    }
}
