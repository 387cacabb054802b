// Runs MSL kernels on one CPU thread: each thread of a threadgroup is a fiber, threadgroups run one after another.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef unsigned int uint;
typedef unsigned char uchar;

enum { MAX_THREADS = 1024, LANES = 32, MAX_SIMDGROUPS = MAX_THREADS / LANES, MAX_BUFFERS = 128 };
enum { THREADGROUP_LIMIT = 32 * 1024 };

typedef struct { uint x, y, z, unused; } uint3;

// The same layout as in msl_entry.h.
typedef struct {
    uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
    uint3 threads_per_threadgroup, dispatch_threads_per_threadgroup, threads_per_grid, grid_size;
    uint3 threadgroups_per_grid, grid_origin;
    uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
    uint simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, threads_per_simdgroup;
    uint thread_execution_width, thread_index_in_quadgroup, quadgroup_index_in_threadgroup;
    uint quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
} __attribute__((aligned(16))) Position;

enum State { READY, AT_SIMD, AT_BARRIER, RETURNED };

typedef struct {
    void *sp;
    enum State state;
    int line;     // where it waits
    uint op;      // the collective it waits at, and the size of its value
    uint flags;   // mem_flags of the barrier it waits at
    uint lane, simdgroup;
    Position position;
} Fiber;

typedef void (*Kernel)(const uint64_t *buffers, const Position *);

// What a dispatch is asked to do. The same layout as `_Request` in dispatch.py.
typedef struct {
    uint64_t kernel;                  // entry point
    uint64_t buffers[MAX_BUFFERS];    // addresses
    uint64_t threadgroup_bytes[32];   // sizes of [[threadgroup(n)]] arguments
    uint grid[3], threadgroup[3];
    uint order, seed, poison;
    uint checked, counting, flush_denormals;
    uint allow_same_value, allow_uninitialised, allow_divergent_barrier;
    uint timeout_s;
} Request;

// What went wrong, and what was done. The same layout as `_Report` in dispatch.py.
typedef struct {
    uint failed, has_thread;
    int line;               // 0 if only `pc` is known
    uint pc;                // offset in the kernel's library
    uint thread[3], group[3];
    uint64_t collectives, barriers, accesses, threadgroup_peak, threadgroup_traffic;
    char reason[512];
} Report;

enum Order { FORWARD, REVERSE, RANDOM };

extern Fiber *current;         // null while the scheduler runs
extern const Request *request;
extern Report report;
extern const void *last_pc;    // of the last checked access
extern uint group_number;      // of the threadgroup that runs, counted from 1

// In reason, {V3} stands for threadgroup variable 3 and {B2} for buffer 2; Python puts their names there.
_Noreturn void fail(int line, const void *pc, const char *format, ...) __attribute__((format(printf, 3, 4)));
void yield_fiber(void);

// schedule.c
void run_grid(void);
void make_stacks(void);
int in_stacks(const char *p);
int on_own_stack(const char *p);
int in_simd_state(const char *p);

// memory.c
extern char *const threadgroup_memory;
void begin_memory(void);
void begin_group_memory(void);
void end_group_memory(void);
const char *describe_address(const char *p, size_t bytes, char *text, size_t size);

// checker.c
void begin_checker(void);
void begin_group_checker(void);
void ordered_threadgroup(uint flags);
void ordered_simdgroup(uint simdgroup, uint flags);
void settle_write(void);
void check_atomic(char *p, uint bytes, int write, const void *pc);

// A device buffer between two guards.
typedef struct {
    char *data;
    size_t bytes;
    char *map;
    size_t map_bytes;
    uchar filling;
    uchar writable, initialised;
    void *shadow;             // of checker.c
    uint32_t *groups_read, *groups_written;   // last threadgroup, by byte; only while counting
    uint64_t traffic[8];      // see `Traffic` in session.py
} Buffer;
extern Buffer buffers[MAX_BUFFERS];
extern uint buffer_count;
Buffer *buffer_near(const char *p);

// A variable in threadgroup memory.
typedef struct { uint id, offset; size_t bytes; } Variable;
const Variable *variable_around(long offset, size_t bytes);

// faults.c
void install_handlers(void);
void remove_handlers(void);
