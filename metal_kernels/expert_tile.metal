// Tiles of a product of x with an expert's weights: 32 pairs, 64 rows of weights, 64 columns at a time. 128 threads bring
// them to threadgroup memory, their 4 simdgroups multiply 16 pairs with 32 rows each, as 8 x 8 matrices.
constant constexpr int TILE_PAIRS = 32;
constant constexpr int TILE_COLUMNS = 64;

// The expert, first pair and number of pairs of a slot. Tiles of expert e have the slots offsets[e] / 32 + e and
// following: e of them more than if all pairs were of one expert, so there are always enough, and some stay empty.
template <int E, typename Offsets>
inline int3 find_tile(Offsets offsets, int slot) {
    int low = 0;
    int high = E;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offsets[middle] / TILE_PAIRS + middle <= slot) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const int first = offsets[low] + (slot - offsets[low] / TILE_PAIRS - low) * TILE_PAIRS;
    return int3(low, first, metal::clamp(offsets[low + 1] - first, 0, TILE_PAIRS));
}

// Elements between rows of a tile, so that 8 rows start in different banks
template <typename Tile>
inline constexpr int tile_stride() {
    return TILE_COLUMNS + 16 / sizeof(Tile);
}

// 16 values of a row, or zeros
template <typename Tile, typename Elem>
inline void stage_values(threadgroup Tile* target, const device Elem* source, bool there) {
    #pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) {
        const float4 four = there ? float4(reinterpret_cast<const device vec<Elem, 4>*>(source)[i]) : float4(0.0f);
        #pragma clang loop unroll(full)
        for (int k = 0; k < 4; k++) {
            target[4 * i + k] = static_cast<Tile>(four[k]);
        }
    }
}

// The 32 weights of a block, or zeros; `block` counts the blocks of all rows. Both formats are exact in bfloat, too.
template <int BITS, typename Tile, typename Scales>
inline void stage_block(threadgroup Tile* target, const device uint* words, Scales scales, size_t block, bool there) {
    const device uint4* start = reinterpret_cast<const device uint4*>(words) + block * (BITS / 4);
    const uint scale = there ? scales[block] : 0;
    #pragma clang loop unroll(full)
    for (int i = 0; i < BITS / 4; i++) {
        const uint4 four = there ? start[i] : uint4(0);
        #pragma clang loop unroll(full)
        for (int k = 0; k < 64 / BITS; k++) {
            constexpr int PAIRS = 16 / BITS;
            const uint word = four[k / PAIRS];
            const half2 pair = BITS == 4 ? e2m1_pair(word, k % PAIRS) : e4m3_pair(word, k % PAIRS);
            const int column = (i * 4 + k / PAIRS) * 2 * PAIRS + k % PAIRS;
            target[column] = static_cast<Tile>(scaled<BITS>(static_cast<float>(pair.x), scale));
            target[column + PAIRS] = static_cast<Tile>(scaled<BITS>(static_cast<float>(pair.y), scale));
        }
    }
}

// sums[4 i + c] += pairs 8 i ... of `xs` times rows 8 c ... of `ws`, where rows 16 to 31 lie 32 after the first
template <typename Tile>
inline void add_products(
    thread simdgroup_float8x8* sums, const threadgroup Tile* xs, const threadgroup Tile* ws) {
    constexpr int STRIDE = tile_stride<Tile>();
    for (int k = 0; k < TILE_COLUMNS; k += 8) {
        simdgroup_matrix<Tile, 8, 8> x[2];
        simdgroup_load(x[0], xs + k, STRIDE);
        simdgroup_load(x[1], xs + 8 * STRIDE + k, STRIDE);
        #pragma clang loop unroll(full)
        for (int c = 0; c < 4; c++) {
            simdgroup_matrix<Tile, 8, 8> w;
            simdgroup_load(w, ws + (c / 2 * 32 + c % 2 * 8) * STRIDE + k, STRIDE, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(sums[c], x[0], w, sums[c]);
            simdgroup_multiply_accumulate(sums[4 + c], x[1], w, sums[4 + c]);
        }
    }
}
