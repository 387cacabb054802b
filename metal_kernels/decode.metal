// Blocks of 32 columns of mxfp4 (BITS 4, numbers are e2m1) and mxfp8 (BITS 8, e4m3) weights; a block has an E8M0 scale,
// and its first column is in the low bits of its first word.
// Exact: the bits of a number become the same fields of a half, whose subnormals stand for those of the format. The
// bias of the exponents, 2^14 or 2^8, is made good once per block. Rows, so also blocks, start at multiples of 16
// bytes: arrays do, and slices of their leading axes.

// (columns 0, 4), (1, 5), (2, 6), (3, 7) of a word for pair 0 ... 3
inline half2 e2m1_pair(uint word, int pair) {
    const uint w = word >> (4 * pair);
    return as_type<half2>(((w << 9) & 0x0e000e00u) | ((w << 12) & 0x80008000u));
}

// (columns 0, 2), (1, 3) of a word for pair 0, 1. A carry out of the seven bits marks NaN, and lands in the exponent.
inline half2 e4m3_pair(uint word, int pair) {
    const uint size = word & 0x7f7f7f7fu;
    const uint w = size | ((size + 0x01010101u) & 0x80808080u);
    const uint sign = (pair == 0 ? word << 8 : word) & 0x80008000u;
    return as_type<half2>((pair == 0 ? (w & 0x00ff00ffu) << 7 : (w >> 1) & 0x7f807f80u) | sign);
}

// Sum of a block's numbers times x, without the scale. Pairs are added in two sums.
template <int BITS>
inline float block_sum(const device uint4* words, const thread float* x) {
    float2 sum = float2(0.0f);
    #pragma clang loop unroll(full)
    for (int i = 0; i < BITS / 4; i++) {
        const uint4 four = words[i];
        #pragma clang loop unroll(full)
        for (int k = 0; k < 64 / BITS; k++) {
            constexpr int PAIRS = 16 / BITS;
            const uint word = four[k / PAIRS];
            const half2 pair = BITS == 4 ? e2m1_pair(word, k % PAIRS) : e4m3_pair(word, k % PAIRS);
            const int column = (i * 4 + k / PAIRS) * 2 * PAIRS + k % PAIRS;
            sum = metal::fma(float2(pair), float2(x[column], x[column + PAIRS]), sum);
        }
    }
    return sum.x + sum.y;
}

// sum * 2^(bits - 127) and the bias. 2^-127 is made of two factors, since GPUs may flush it; 255 is infinity, as MLX
// has it.
template <int BITS>
inline float scaled(float sum, uint bits) {
    const float bias = BITS == 4 ? 16384.0f : 256.0f;
    return sum * (bits == 0u ? 0.5f * bias : bias) * as_type<float>(metal::max(bits, 1u) << 23);
}

// Adds the block's part of a row's product; `block` counts the blocks of all rows.
template <int BITS, typename Scales>
inline void add_block(
    thread float& sum, const device uint* words, Scales scales, size_t block, const thread float* x) {
    const device uint4* start = reinterpret_cast<const device uint4*>(words) + block * (BITS / 4);
    sum += scaled<BITS>(block_sum<BITS>(start, x), scales[block]);
}

template <typename Elem>
inline void load_block(thread float* x, const device Elem* source) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < 8; i++) {
        const float4 four = float4(reinterpret_cast<const device vec<Elem, 4>*>(source)[i]);
        #pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++) {
            x[4 * i + k] = four[k];
        }
    }
}
