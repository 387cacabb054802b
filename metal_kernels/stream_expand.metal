// out[t, k, d] = post[t, k] * y[t, d] + sum over j of comb[t, j, k] * x[t, j, d]
//
// Grid (D rounded up to whole threadgroups, T); a thread owns element d of all N streams, so x and y are read once.
// The first index of comb is the source. Sources are added in order in float, post * y last, and the result is
// rounded once, as in the reference. Fused because the mixed streams would else be written in float and read back.
const int d = thread_position_in_grid.x;
const size_t token = thread_position_in_grid.y;
if (d < D) {
    float streams[N];
    for (int j = 0; j < N; j++) {
        streams[j] = static_cast<float>(x[(token * N + j) * D + d]);
    }
    const float result = static_cast<float>(y[token * D + d]);
    for (int k = 0; k < N; k++) {
        float sum = 0.0f;
        for (int j = 0; j < N; j++) {
            sum += comb[(token * N + j) * N + k] * streams[j];
        }
        out[(token * N + k) * D + d] = static_cast<Elem>(sum + post[token * N + k] * result);
    }
}
