// Fibers, and who runs when. A simdgroup runs until all of its lanes wait at the same place or have returned.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

enum { STACK_BYTES = 256 * 1024, PAGE = 4096 };
enum { OP_BARRIER = 1 };

// The same layout as in msl_simd.h.
typedef struct {
    uint64_t mask;
    uint computed[2];
    uint parity, unused;
    uchar slot[2][LANES][32] __attribute__((aligned(32)));
    uchar result[2][32];
} SimdState;

static Fiber fibers[MAX_THREADS];
static SimdState simd_states[MAX_SIMDGROUPS];
static uint thread_count, simdgroup_count;
static char *stacks;
static void *scheduler_sp;
static uint random_state;

Fiber *current;
uint group_number;

void make_stacks(void) {
    if (stacks) return;
    size_t bytes = (size_t)MAX_THREADS * STACK_BYTES;
    stacks = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + (size_t)i * STACK_BYTES, PAGE, PROT_NONE);
}

int in_stacks(const char *p) { return stacks && p >= stacks && p < stacks + (size_t)MAX_THREADS * STACK_BYTES; }

int on_own_stack(const char *p) {
    return in_stacks(p) && (size_t)(p - stacks) / STACK_BYTES == (size_t)(current - fibers);
}

int in_simd_state(const char *p) { return p >= (char *)simd_states && p < (char *)(simd_states + MAX_SIMDGROUPS); }

// Saves the callee-saved registers and the stack of one side, and continues the other.
__attribute__((naked, noinline)) static void switch_stack(void **save, void *to) {
    __asm__("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
            "mov %rsp, (%rdi); mov %rsi, %rsp\n"
            "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

void yield_fiber(void) {
    Fiber *me = current;
    switch_stack(&me->sp, scheduler_sp);
}

static void fiber_main(void) {
    ((Kernel)request->kernel)(request->buffers, &current->position);
    current->state = RETURNED;
    yield_fiber();
    __builtin_trap();  // nobody continues a fiber that has returned
}

static void prepare_stack(Fiber *f, uint index) {
    void **sp = (void **)(stacks + (size_t)(index + 1) * STACK_BYTES - 64);
    *--sp = 0;  // keeps the alignment of a call
    *--sp = (void *)fiber_main;
    sp -= 6;
    memset(sp, 0, 6 * sizeof *sp);
    f->sp = sp;
}

// --- what a kernel calls ---------------------------------------------------------------------------

uint64_t __msl_sync_simd(const void *value, uint bytes, int line, uint op) {
    Fiber *f = current;
    SimdState *s = &simd_states[f->simdgroup];
    memcpy(s->slot[s->parity][f->lane], value, bytes);
    f->state = AT_SIMD;
    f->line = line;
    f->op = op | bytes << 8;
    report.collectives++;
    yield_fiber();
    return (uint64_t)s;
}

void __msl_simdgroup_barrier(uint flags, int line) {
    current->flags = flags;
    __msl_sync_simd("", 1, line, OP_BARRIER);
}

void __msl_threadgroup_barrier(uint flags, int line) {
    current->state = AT_BARRIER;
    current->line = line;
    current->flags = flags;
    report.barriers++;
    yield_fiber();
}

uint __msl_lane(void) { return current->lane; }

void __msl_trap(uint reason, int line) {
    fail(line, 0, reason == 1 ? "shuffle reads a lane that is inactive or out of range"
                              : "simdgroup_matrix operation with inactive lanes");
}

// --- the order of things ---------------------------------------------------------------------------

static uint random_below(uint n) {
    random_state = random_state * 1664525u + 1013904223u;
    return (random_state >> 8) % n;
}

static void permute(uint *index, uint n) {
    for (uint i = 0; i < n; i++) index[i] = request->order == REVERSE ? n - 1 - i : i;
    if (request->order != RANDOM) return;
    for (uint i = n; i > 1; i--) {
        uint j = random_below(i), t = index[i - 1];
        index[i - 1] = index[j];
        index[j] = t;
    }
}

static uint lanes_of(uint simdgroup) {
    uint left = thread_count - simdgroup * LANES;
    return left < LANES ? left : LANES;
}

static void run_ready_lanes(uint simdgroup) {
    uint lanes[LANES], n = lanes_of(simdgroup);
    permute(lanes, n);
    for (uint i = 0; i < n; i++) {
        Fiber *f = &fibers[simdgroup * LANES + lanes[i]];
        if (f->state != READY) continue;
        current = f;
        switch_stack(&scheduler_sp, f->sp);
        settle_write();
        current = 0;
    }
}

static void expect_together(const Fiber *a, Fiber *b) {
    if (a->line == b->line && a->op == b->op) return;
    current = b;
    fail(b->line, 0, "divergent simdgroup operation: lane %u waits at line {L%d}, lane %u at line {L%d}", a->lane,
         a->line, b->lane, b->line);
}

// Releases the lanes that wait at a collective; false if none does.
static int finish_collective(uint simdgroup) {
    Fiber *first = &fibers[simdgroup * LANES], *waiting = 0, *at_barrier = 0;
    uint64_t mask = 0;
    for (uint lane = 0; lane < lanes_of(simdgroup); lane++) {
        Fiber *f = first + lane;
        if (f->state == AT_BARRIER) at_barrier = f;
        if (f->state != AT_SIMD) continue;
        if (!waiting) waiting = f;
        expect_together(waiting, f);
        mask |= 1ul << lane;
    }
    if (!waiting) return 0;
    if (at_barrier) {
        current = waiting;
        fail(waiting->line, 0, "divergence inside a simdgroup: lane %u is at a simdgroup operation on line {L%d}, "
             "lane %u at threadgroup_barrier on line {L%d}", waiting->lane, waiting->line, at_barrier->lane,
             at_barrier->line);
    }
    if ((waiting->op & 255) == OP_BARRIER) ordered_simdgroup(simdgroup, waiting->flags);
    SimdState *s = &simd_states[simdgroup];
    s->mask = mask;
    s->computed[s->parity] = 0;
    s->parity ^= 1;
    for (uint lane = 0; lane < LANES; lane++) {
        if (mask >> lane & 1) first[lane].state = READY;
    }
    return 1;
}

static void expect_same_barrier(Fiber *a, Fiber *b) {
    if (request->allow_divergent_barrier) return;
    current = b;
    if (b->state == RETURNED) {
        fail(a->line, 0, "threadgroup_barrier on line {L%d} is not reached by all threads: this one has returned",
             a->line);
    }
    if (a->line != b->line) {
        fail(b->line, 0, "threads of one threadgroup wait at different barriers: lines {L%d} and {L%d}", a->line,
             b->line);
    }
    current = 0;
}

// Releases the threadgroup barrier at which all simdgroups have arrived; false if all threads have returned.
static int finish_barrier(void) {
    Fiber *waiting = 0;
    for (uint i = 0; i < thread_count && !waiting; i++) {
        if (fibers[i].state == AT_BARRIER) waiting = &fibers[i];
    }
    if (!waiting) return 0;
    uint flags = waiting->flags;
    for (uint i = 0; i < thread_count; i++) {
        expect_same_barrier(waiting, &fibers[i]);
        if (fibers[i].state != AT_BARRIER) continue;
        flags &= fibers[i].flags;
        fibers[i].state = READY;
    }
    ordered_threadgroup(flags);
    return 1;
}

static uint3 triple(const uint v[3]) { return (uint3){v[0], v[1], v[2], 0}; }

static void place_thread(uint i, const uint group[3], const uint size[3], const uint nominal[3], const uint groups[3]) {
    Fiber *f = &fibers[i];
    uint local[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])}, global[3];
    for (int k = 0; k < 3; k++) global[k] = group[k] * nominal[k] + local[k];
    uint nominal_simdgroups = (nominal[0] * nominal[1] * nominal[2] + LANES - 1) / LANES;
    *f = (Fiber){.state = READY, .lane = i % LANES, .simdgroup = i / LANES, .position = {
        .thread_position_in_grid = triple(global), .thread_position_in_threadgroup = triple(local),
        .threadgroup_position_in_grid = triple(group), .threads_per_threadgroup = triple(size),
        .dispatch_threads_per_threadgroup = triple(nominal), .threads_per_grid = triple(request->grid),
        .grid_size = triple(request->grid), .threadgroups_per_grid = triple(groups),
        .thread_index_in_threadgroup = i, .thread_index_in_simdgroup = i % LANES,
        .simdgroup_index_in_threadgroup = i / LANES, .simdgroups_per_threadgroup = simdgroup_count,
        .dispatch_simdgroups_per_threadgroup = nominal_simdgroups, .threads_per_simdgroup = LANES,
        .thread_execution_width = LANES, .thread_index_in_quadgroup = i % 4,
        .quadgroup_index_in_threadgroup = i / 4, .quadgroups_per_threadgroup = (thread_count + 3) / 4,
        .dispatch_quadgroups_per_threadgroup = nominal_simdgroups * 8}};
    prepare_stack(f, i);
}

static void run_group(const uint group[3], const uint nominal[3], const uint groups[3]) {
    uint size[3];  // groups at the end of the grid are smaller
    for (int k = 0; k < 3; k++) {
        size[k] = request->grid[k] - group[k] * nominal[k];
        if (size[k] > nominal[k]) size[k] = nominal[k];
    }
    thread_count = size[0] * size[1] * size[2];
    simdgroup_count = (thread_count + LANES - 1) / LANES;
    begin_group_memory();
    begin_group_checker();
    for (uint i = 0; i < thread_count; i++) place_thread(i, group, size, nominal, groups);
    for (uint s = 0; s < simdgroup_count; s++) simd_states[s].parity = simd_states[s].mask = 0;
    do {
        uint simdgroups[MAX_SIMDGROUPS];
        permute(simdgroups, simdgroup_count);
        for (uint i = 0; i < simdgroup_count; i++) {
            do run_ready_lanes(simdgroups[i]);
            while (finish_collective(simdgroups[i]));
        }
    } while (finish_barrier());
    end_group_memory();
}

void run_grid(void) {
    uint nominal[3], groups[3];
    for (int k = 0; k < 3; k++) {
        nominal[k] = request->threadgroup[k] < request->grid[k] ? request->threadgroup[k] : request->grid[k];
        groups[k] = (request->grid[k] + nominal[k] - 1) / nominal[k];
    }
    uint threads = nominal[0] * nominal[1] * nominal[2];
    if (threads > MAX_THREADS) fail(0, 0, "threadgroup of %u threads, at most %d", threads, MAX_THREADS);
    random_state = request->seed;
    uint n = groups[0] * groups[1] * groups[2], *order = malloc(n * sizeof *order);
    permute(order, n);
    for (uint i = 0; i < n; i++) {
        uint g = order[i];
        group_number = g + 1;
        uint group[3] = {g % groups[0], g / groups[0] % groups[1], g / (groups[0] * groups[1])};
        run_group(group, nominal, groups);
    }
    free(order);
}
