// 8 x 8 matrices of a simdgroup. A lane holds two neighbours of a row, in the places that MLX's own kernels rely on.
inline int matrix_row(int lane) {
    return lane / 16 * 4 + lane / 2 % 4;
}

inline int matrix_column(int lane) {
    return lane / 8 % 2 * 4 + lane % 2 * 2;
}

// The two elements of this lane
template <typename Elem>
inline thread vec<Elem, 2>& pair_of(thread simdgroup_matrix<Elem, 8, 8>& matrix) {
    return reinterpret_cast<thread vec<Elem, 2>&>(matrix.thread_elements());
}

// Over the four lanes of a row
inline float row_sum(float x) {
    x += simd_shuffle_xor(x, ushort(1));
    return x + simd_shuffle_xor(x, ushort(8));
}

inline float row_max(float x) {
    x = metal::max(x, simd_shuffle_xor(x, ushort(1)));
    return metal::max(x, simd_shuffle_xor(x, ushort(8)));
}
