// y[p, f] = weight[p] * silu(min(g, limit)) * clip(u, -limit, limit) with g = w1[e, f] . x[t], u = w3[e, f] . x[t] and
// t = token[p], e = expert[p]. With SHARED, row P + t of y is that of the shared expert, without a weight.
//
// Grid (32, row groups, pairs and tokens), a threadgroup is 32 by some simdgroups, all of one pair or one token. A
// simdgroup owns ROWS rows f of both matrices; a lane takes every 32nd block of 32 columns and uses its part of x for
// all rows, so that neighbouring lanes read neighbouring words; lane r finishes row r. Sums are in float, in an order
// that depends on D alone; g and u are rounded to Elem before the activation, which is in float, and the result once
// after the weight, as in the reference. Comparisons, not min and clamp, which may lose NaN.
// Fused because g and u would be written and read back, and x be gathered, each in a launch of its own; a pair reads
// every byte of its weights once. The shared expert has a format of its own and needs nothing that the pairs make, so
// it would be launches that wait. Offsets are 64-bit.
const int lane = thread_index_in_simdgroup;
const int first = thread_position_in_grid.y * ROWS;
const size_t pair = thread_position_in_grid.z;
const size_t pairs = expert_shape[0];
const bool routed = !SHARED || pair < pairs;
const size_t t = routed ? static_cast<size_t>(token[pair]) : pair - pairs;

float gate[ROWS] = {};
float up[ROWS] = {};
for (int block = lane; block < D / 32; block += 32) {
    float values[32];
    load_block(values, x + t * D + block * 32);
    if (routed) {
        const int e = expert[pair];
        add_rows<ROWS, BITS, GROUP, AFFINE>(gate, w1, s1, b1, e, F, first, D / 32, block, values);
        add_rows<ROWS, BITS, GROUP, AFFINE>(up, w3, s3, b3, e, F, first, D / 32, block, values);
    } else {
        add_rows<ROWS, SHARED_BITS, SHARED_GROUP, SHARED_AFFINE>(
            gate, shared_w1, shared_s1, shared_b1, 0, F, first, D / 32, block, values);
        add_rows<ROWS, SHARED_BITS, SHARED_GROUP, SHARED_AFFINE>(
            up, shared_w3, shared_s3, shared_b3, 0, F, first, D / 32, block, values);
    }
}

float g = 0.0f;
float u = 0.0f;
#pragma clang loop unroll(full)
for (int r = 0; r < ROWS; r++) {
    const float gate_sum = simd_sum(gate[r]);
    const float up_sum = simd_sum(up[r]);
    g = lane == r ? gate_sum : g;
    u = lane == r ? up_sum : u;
}
if (lane < ROWS && first + lane < F) {
    g = static_cast<float>(static_cast<Elem>(g));
    u = static_cast<float>(static_cast<Elem>(u));
    g = g > limit[0] ? limit[0] : g;
    u = u > limit[0] ? limit[0] : u < -limit[0] ? -limit[0] : u;
    const float h = g / (1.0f + metal::precise::exp(-g)) * u;
    y[pair * F + first + lane] = static_cast<Elem>(routed ? h * weight[pair] : h);
}
