// picks[t] = the k highest of scores[t, 0 ... visible[t] - 1], of equal ones the lower row; ascending, -1 in front
//
// Grid (1024, queries), one threadgroup per query. Scores become whole numbers of the same order (order_of). Three
// rounds count how often each value of the upper 10, then 11, then 11 bits occurs, and keep the value in which the
// last chosen one lies; what remains is the number of the last chosen one, `cut`, and how many equal to it, `left`,
// have a place. Then each simdgroup counts what it takes of its own stretch of rows, and writes it behind what the
// simdgroups before it take: in order of rows, without sorting. Only whole numbers are added, so the choice is the
// reference's whatever the order of the threads. NaN comes after the rows that may not be seen, as in the reference.
constexpr int THREADS = 1024;
constexpr int BINS = 2048;
const int thread_index = thread_position_in_threadgroup.x;
const int lane = thread_index_in_simdgroup;
const int simd = simdgroup_index_in_threadgroup;

threadgroup atomic_uint counts[BINS];
threadgroup int sums[32];
threadgroup int equals[32];
threadgroup int found[2];

const size_t query = threadgroup_position_in_grid.y;
const int S = scores_shape[2];
const int k = places[0];
const int seen = clamp(static_cast<int>(visible[query % static_cast<size_t>(scores_shape[1])]), 0, S);
const size_t own = query * static_cast<size_t>(S);

int chosen = 0;  // rows to choose in all
int left = 0;    // and of those whose upper bits are `cut`
uint cut = 0u;
uint mask = 0u;  // the bits of `cut` that are known
for (int shift = 22; shift >= 0; shift -= 11) {
    for (int i = thread_index; i < BINS; i += THREADS) {
        atomic_store_explicit(&counts[i], 0u, memory_order_relaxed);
    }
    if (thread_index < 2) {
        found[thread_index] = 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // Four at a time, so that reads do not wait for one another.
    for (int start = thread_index; start < seen; start += 4 * THREADS) {
        uint orders[4];
        #pragma clang loop unroll(full)
        for (int j = 0; j < 4; j++) {
            orders[j] = order_of(scores[own + min(start + j * THREADS, seen - 1)]);
        }
        #pragma clang loop unroll(full)
        for (int j = 0; j < 4; j++) {
            if (start + j * THREADS < seen && (orders[j] & mask) == cut) {
                atomic_fetch_add_explicit(&counts[(orders[j] >> shift) % BINS], 1u, memory_order_relaxed);
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (shift == 22) {
        // Upper bits 0: only NaN has them.
        const int nans = static_cast<int>(atomic_load_explicit(&counts[0], memory_order_relaxed));
        chosen = min(k, seen - nans) + max(0, k - (S - nans));
        left = chosen;
    }
    // From the highest value down, two to a thread: how many are before them?
    const int high = BINS - 1 - 2 * thread_index;
    const int first = static_cast<int>(atomic_load_explicit(&counts[high], memory_order_relaxed));
    const int second = static_cast<int>(atomic_load_explicit(&counts[high - 1], memory_order_relaxed));
    int before = simd_prefix_exclusive_sum(first + second);
    if (lane == 31) {
        sums[simd] = before + first + second;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    before += simd_shuffle(simd_prefix_exclusive_sum(sums[lane]), simd);
    // Nobody finds it if nothing is chosen. Then all that is seen is NaN, and a cut of 0 with no place takes nothing.
    if (before < left && left <= before + first + second) {
        const bool upper = left <= before + first;
        found[0] = upper ? high : high - 1;
        found[1] = upper ? left - before : left - before - first;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    cut |= static_cast<uint>(found[0]) << shift;
    left = found[1];
    mask = ~0u << shift;
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

device int* mine = picks + query * static_cast<size_t>(k);
for (int i = thread_index; i < k - chosen; i += THREADS) {
    mine[i] = -1;
}
const int stretch = (seen + THREADS - 1) / THREADS * 32;  // of a simdgroup
const int start = simd * stretch;
const int stop = min(start + stretch, seen);
int above = 0;
int equal = 0;
for (int i = start + lane; i < stop; i += 32) {
    const uint order = order_of(scores[own + i]);
    above += order > cut ? 1 : 0;
    equal += order == cut ? 1 : 0;
}
above = simd_sum(above);
equal = simd_sum(equal);
if (lane == 0) {
    sums[simd] = above;
    equals[simd] = equal;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
above = simd_shuffle(simd_prefix_exclusive_sum(sums[lane]), simd);
equal = simd_shuffle(simd_prefix_exclusive_sum(equals[lane]), simd);
int place = k - chosen + above + min(equal, left);
for (int i = start; i < stop; i += 32) {
    const int row = i + lane;
    const uint order = order_of(scores[own + min(row, stop - 1)]);
    const int is_equal = row < stop && order == cut ? 1 : 0;
    const int rank = equal + simd_prefix_exclusive_sum(is_equal);
    const int taken = row < stop && (order > cut || (is_equal == 1 && rank < left)) ? 1 : 0;
    const int offset = simd_prefix_exclusive_sum(taken);
    if (taken == 1) {
        mine[place + offset] = row;
    }
    place += simd_sum(taken);
    equal += simd_sum(is_equal);
}
