// Blocks of 32 columns of packed weights; a block is BITS words, its first column in the low bits of the first.
//   mxfp4, mxfp8: BITS 4 or 8, numbers e2m1 or e4m3, an E8M0 scale for GROUP 32 columns
//   nvfp4: BITS 4, numbers e2m1, an e4m3 scale for GROUP 16 columns
//   AFFINE: whole numbers of 2, 3, 4, 5, 6 or 8 bits, times a scale plus a bias for GROUP 32, 64 or 128 columns. They
//     follow each other without gaps, so that one of 3, 5 or 6 bits may lie in two words.
// Exact: the bits of e2m1 and e4m3 become the same fields of a half, whose subnormals stand for those of the format.
// The bias of the exponents, 2^14 or 2^8, is made good once per block. Arrays, and slices of their leading axes, start
// at multiples of 16 bytes; so do the blocks of 4 and 8 bits.
constant constexpr float E2M1_BIAS = 16384.0f;
constant constexpr float E4M3_BIAS = 256.0f;

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

template <int BITS>
inline float whole_number(const thread uint* words, int column) {
    const int word = column * BITS / 32;
    const int shift = column * BITS % 32;
    uint code = words[word] >> shift;
    if (shift + BITS > 32) {
        code |= words[word + 1] << (32 - shift);
    }
    return static_cast<float>(code & ((1u << BITS) - 1u));
}

template <int BITS>
inline void load_words(thread uint* words, const device uint* source) {
    if constexpr (BITS % 4 == 0) {
        #pragma clang loop unroll(full)
        for (int i = 0; i < BITS / 4; i++) {
            const uint4 four = reinterpret_cast<const device uint4*>(source)[i];
            #pragma clang loop unroll(full)
            for (int k = 0; k < 4; k++) {
                words[4 * i + k] = four[k];
            }
        }
    } else {
        #pragma clang loop unroll(full)
        for (int i = 0; i < BITS; i++) {
            words[i] = source[i];
        }
    }
}

// Sum of the numbers of COUNT columns from FIRST on times x, without scale and bias. Pairs are added in two sums.
template <int BITS, bool AFFINE, int FIRST, int COUNT>
inline float number_sum(const thread uint* words, const thread float* x) {
    float2 sum = float2(0.0f);
    #pragma clang loop unroll(full)
    for (int i = 0; i < COUNT / 2; i++) {
        if constexpr (AFFINE) {
            const int column = FIRST + 2 * i;
            const float2 pair = float2(whole_number<BITS>(words, column), whole_number<BITS>(words, column + 1));
            sum = metal::fma(pair, float2(x[column], x[column + 1]), sum);
        } else {
            constexpr int PAIRS = 16 / BITS;
            const int word = FIRST * BITS / 32 + i / PAIRS;
            const half2 pair = BITS == 4 ? e2m1_pair(words[word], i % PAIRS) : e4m3_pair(words[word], i % PAIRS);
            const int column = word * 2 * PAIRS + i % PAIRS;
            sum = metal::fma(float2(pair), float2(x[column], x[column + PAIRS]), sum);
        }
    }
    return sum.x + sum.y;
}

// number * 2^(bits - 127), and the bias of mxfp4 or mxfp8. 2^-127 is made of two factors, since GPUs may flush it; 255
// is infinity, as MLX has it.
template <int BITS>
inline float scaled(float number, uint bits) {
    const float bias = BITS == 4 ? E2M1_BIAS : E4M3_BIAS;
    return number * (bits == 0u ? 0.5f * bias : bias) * as_type<float>(metal::max(bits, 1u) << 23);
}

// Adds the block's part of a row's product; `block` counts the blocks of all rows, x_sum is the sum of x.
template <int BITS, int GROUP, bool AFFINE, typename Scales>
inline void add_block(
    thread float& sum, const device uint* source, Scales scales, Scales biases, size_t block, const thread float* x,
    float x_sum) {
    uint words[BITS];
    load_words<BITS>(words, source + block * BITS);
    if constexpr (AFFINE) {
        const size_t group = block / (GROUP / 32);
        sum = metal::fma(static_cast<float>(scales[group]), number_sum<BITS, true, 0, 32>(words, x), sum);
        sum = metal::fma(static_cast<float>(biases[group]), x_sum, sum);
    } else if constexpr (GROUP == 16) {
        const float low = static_cast<float>(e4m3_pair(scales[2 * block], 0).x);
        const float high = static_cast<float>(e4m3_pair(scales[2 * block + 1], 0).x);
        const float numbers = number_sum<BITS, false, 0, 16>(words, x) * low;
        sum += (numbers + number_sum<BITS, false, 16, 16>(words, x) * high) * (E2M1_BIAS * E4M3_BIAS);
    } else {
        sum += scaled<BITS>(number_sum<BITS, false, 0, 32>(words, x), scales[block]);
    }
}

// Adds a block's part of the product of x with ROWS rows of an expert's matrix, from row `first` on; those beyond its
// last row repeat that row. The experts of a layer hold more than 2^31 bytes: offsets are 64-bit.
template <int ROWS, int BITS, int GROUP, bool AFFINE, typename Scales>
inline void add_rows(
    thread float* sums, const device uint* source, Scales scales, Scales biases, int expert, int rows, int first,
    int blocks, int block, const thread float* x) {
    float x_sum = 0.0f;
    if constexpr (AFFINE) {
        #pragma clang loop unroll(full)
        for (int i = 0; i < 32; i++) {
            x_sum += x[i];
        }
    }
    #pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; r++) {
        const size_t row = static_cast<size_t>(expert) * rows + metal::min(first + r, rows - 1);
        add_block<BITS, GROUP, AFFINE>(sums[r], source, scales, biases, row * blocks + block, x, x_sum);
    }
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
