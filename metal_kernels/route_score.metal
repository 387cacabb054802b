// sqrt(ln(1 + e^z)) without overflow; where e^z is too small to keep, sqrt(e^z) = e^(z/2) still is a number.
inline float route_score(float z) {
    if (z < -20.0f) {
        return metal::precise::exp(0.5f * z);
    }
    // ln(1 + x) for x from 0 to 1: the factor makes up for what 1 + x has lost of x.
    const float x = metal::precise::exp(-metal::abs(z));
    const float y = 1.0f + x;
    const float ln = y == 1.0f ? x : metal::precise::log(y) * (x / (y - 1.0f));
    return metal::precise::sqrt((z > 0.0f ? z : 0.0f) + ln);
}
