// The bits of a float32 as a number that orders as floats do: both zeros are equal, NaN is 0 and below all others.
// In whole numbers, so that it is exact whatever the arithmetic does with denormals.
inline uint order_of(float score) {
    const uint bits = as_type<uint>(score);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0u;
    }
    if (bits == 0x80000000u) {
        return 0x80000000u;
    }
    return (bits & 0x80000000u) != 0u ? ~bits : bits | 0x80000000u;
}
