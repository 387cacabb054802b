// The memory checker: bounds, reads of what nobody wrote, and races.
//
// Kernels are compiled with -fsanitize=thread, but the functions it calls are ours. Each byte of threadgroup memory
// and of an output remembers its last writers and readers. Two accesses conflict if they come from different threads,
// at least one writes, not both are atomic, and no barrier that covers this memory lies between them.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum Kind { NOBODY, PLAIN, ATOMIC };
enum Space { THREADGROUP, DEVICE };
// In place of a thread: several threads of one simdgroup (plus its number), of one threadgroup, of several.
enum { LANES_OF = 2048, SIMDGROUPS = 4096, GROUPS = 4097 };
enum { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };

typedef struct {
    uint32_t group, threadgroup_epoch, simdgroup_epoch;
    uint16_t who;
    uchar kind;
} Access;

typedef struct { Access writers, readers; } Cell;

// Number of barriers so far that cover a space.
static uint32_t threadgroup_epoch[2], simdgroup_epoch[2][MAX_SIMDGROUPS];
static Cell threadgroup_cells[THREADGROUP_LIMIT + 64 * 256];
static const char *library_start, *library_end;

// A write of what may be the value that is there; known at the next event of the same thread.
static struct { int active; char *p; uchar before[64]; uint bytes; const void *pc; char what[96]; } unsettled;

static int find_library(struct dl_phdr_info *info, size_t size, void *unused) {
    const char *start = (char *)info->dlpi_addr, *end = start;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *h = &info->dlpi_phdr[i];
        if (h->p_type == PT_LOAD && start + h->p_vaddr + h->p_memsz > end) end = start + h->p_vaddr + h->p_memsz;
    }
    if ((char *)request->kernel < start || (char *)request->kernel >= end) return 0;
    library_start = start;
    library_end = end;
    return 1;
}

void begin_checker(void) {
    unsettled.active = 0;
    library_start = library_end = 0;
    dl_iterate_phdr(find_library, 0);
    memset(threadgroup_cells, 0, sizeof threadgroup_cells);
    for (uint i = 0; i < buffer_count; i++) {
        Buffer *b = &buffers[i];
        if (request->checked && b->writable) b->shadow = calloc(b->bytes + 1, sizeof(Cell));
        if (!request->counting) continue;
        b->groups_read = calloc(b->bytes + 1, sizeof *b->groups_read);
        b->groups_written = calloc(b->bytes + 1, sizeof *b->groups_written);
    }
}

void begin_group_checker(void) {
    memset(threadgroup_epoch, 0, sizeof threadgroup_epoch);
    memset(simdgroup_epoch, 0, sizeof simdgroup_epoch);
}

void ordered_threadgroup(uint flags) {
    if (flags & MEM_THREADGROUP) threadgroup_epoch[THREADGROUP]++;
    if (flags & MEM_DEVICE) threadgroup_epoch[DEVICE]++;
}

void ordered_simdgroup(uint simdgroup, uint flags) {
    if (flags & MEM_THREADGROUP) simdgroup_epoch[THREADGROUP][simdgroup]++;
    if (flags & MEM_DEVICE) simdgroup_epoch[DEVICE][simdgroup]++;
}

// --- who came before -------------------------------------------------------------------------------

static uint simdgroup_of(uint who) { return who < MAX_THREADS ? who / LANES : who - LANES_OF; }

// Whether all that `a` stands for happened before what the current thread does now.
static int ordered(const Access *a, enum Space space) {
    if (a->group != group_number) return 0;
    if (a->who == (uint)current->position.thread_index_in_threadgroup) return 1;
    if (a->threadgroup_epoch != threadgroup_epoch[space]) return a->who != GROUPS;
    if (a->who >= SIMDGROUPS || simdgroup_of(a->who) != current->simdgroup) return 0;
    return a->simdgroup_epoch != simdgroup_epoch[space][current->simdgroup];
}

static int conflicts(const Access *a, enum Space space, int atomic) {
    return a->kind != NOBODY && !(atomic && a->kind == ATOMIC) && !ordered(a, space);
}

// Adds the current thread to `a`. Those before it are dropped if they are ordered before it: whoever conflicts with
// them later conflicts with it, too.
static void remember(Access *a, enum Space space, int atomic) {
    uint who = current->position.thread_index_in_threadgroup, kind = atomic ? ATOMIC : PLAIN;
    if (a->kind != NOBODY && !ordered(a, space)) {
        if (a->kind == PLAIN) kind = PLAIN;
        if (a->group != group_number) who = GROUPS;
        else if (a->who == GROUPS) who = GROUPS;
        else if (a->who < SIMDGROUPS && simdgroup_of(a->who) == current->simdgroup) who = LANES_OF + current->simdgroup;
        else who = SIMDGROUPS;
    }
    *a = (Access){group_number, threadgroup_epoch[space], simdgroup_epoch[space][current->simdgroup], who, kind};
}

static const char *name_of(const Access *a, char *text, size_t size) {
    if (a->group != group_number || a->who == GROUPS) snprintf(text, size, "another threadgroup");
    else if (a->who == SIMDGROUPS) snprintf(text, size, "threads of several simdgroups");
    else if (a->who >= LANES_OF) snprintf(text, size, "several lanes of simdgroup %u", a->who - LANES_OF);
    else snprintf(text, size, "thread %u of this threadgroup", a->who);
    return text;
}

// --- one access ------------------------------------------------------------------------------------

typedef struct {
    char *p;
    uint bytes;
    int write, atomic;
    const void *pc;
    enum Space space;
    uint owner;  // number of the buffer, or of the threadgroup variable
    long offset;
} Event;

static const char *describe(const Event *e, char *text, size_t size) {
    snprintf(text, size, e->space == DEVICE ? "byte %ld of {B%u}" : "byte %ld of threadgroup variable {V%u}", e->offset,
             e->owner);
    return text;
}

static _Noreturn void race(const Event *e, const Access *other, const char *did) {
    char what[96], who[64];
    fail(0, e->pc, "race: %s %s, which %s %s without a barrier%s in between", e->write ? "writes" : "reads",
         describe(e, what, sizeof what), name_of(other, who, sizeof who), did,
         e->space == DEVICE ? " (of mem_device; none works across threadgroups)" : " (of mem_threadgroup)");
}

// With the allowance, whether a racing write changes anything is seen once it is done.
static void settle_later(const Event *e) {
    if (e->bytes > sizeof unsettled.before) return;
    unsettled.p = e->p;
    unsettled.bytes = e->bytes;
    unsettled.pc = e->pc;
    unsettled.active = 1;
    memcpy(unsettled.before, e->p, e->bytes);
    describe(e, unsettled.what, sizeof unsettled.what);
}

void settle_write(void) {
    if (!unsettled.active) return;
    unsettled.active = 0;
    if (memcmp(unsettled.p, unsettled.before, unsettled.bytes)) {
        fail(0, unsettled.pc, "race: writes another value than another thread did to %s", unsettled.what);
    }
}

static void check_cell(Event *e, Cell *c, int initialised) {
    // Threadgroup memory of another threadgroup is gone.
    if (e->space == THREADGROUP && c->writers.group != group_number) c->writers = (Access){0};
    if (e->space == THREADGROUP && c->readers.group != group_number) c->readers = (Access){0};
    if (!e->write && c->writers.kind == NOBODY && !initialised) {
        char what[96];
        fail(0, e->pc, "reads %s, which nobody has written yet", describe(e, what, sizeof what));
    }
    if (conflicts(&c->writers, e->space, e->atomic)) {
        if (!e->write || !request->allow_same_value) race(e, &c->writers, "wrote");
        settle_later(e);
    }
    if (e->write && conflicts(&c->readers, e->space, e->atomic)) {
        if (!request->allow_same_value) race(e, &c->readers, "read");
        settle_later(e);
    }
    remember(e->write ? &c->writers : &c->readers, e->space, e->atomic);
}

static void count_access(Buffer *b, long offset, uint bytes, int write) {
    uint64_t *t = b->traffic + (write ? 4 : 0);
    uint32_t *last = write ? b->groups_written : b->groups_read;
    t[0]++;
    t[1] += bytes;
    for (uint i = 0; i < bytes; i++) {
        t[2] += !last[offset + i];
        t[3] += last[offset + i] != group_number;
        last[offset + i] = group_number;
    }
}

static _Noreturn void out_of_bounds(const Event *e) {
    char text[160];
    fail(0, e->pc, "%s out of bounds: %s", e->write ? "write" : "read",
         describe_address(e->p, e->bytes, text, sizeof text));
}

static void check_threadgroup(Event *e) {
    long offset = e->p - threadgroup_memory;
    const Variable *v = variable_around(offset, e->bytes);
    if (!v) out_of_bounds(e);
    e->space = THREADGROUP;
    e->owner = v->id;
    report.threadgroup_traffic += e->bytes;
    for (uint i = 0; i < e->bytes; i++) {
        e->offset = offset + i - v->offset;
        check_cell(e, &threadgroup_cells[offset + i], request->allow_uninitialised);
    }
}

static void check_device(Event *e, Buffer *b) {
    long offset = e->p - b->data;
    e->space = DEVICE;
    e->owner = b - buffers;
    if (offset < 0 || offset + e->bytes > b->bytes) out_of_bounds(e);
    if (request->counting) count_access(b, offset, e->bytes, e->write);
    if (!b->writable) {
        if (e->write) fail(0, e->pc, "write to input {B%u}, byte %ld", e->owner, offset);
        return;
    }
    for (uint i = 0; i < e->bytes; i++) {
        e->offset = offset + i;
        check_cell(e, (Cell *)b->shadow + offset + i, b->initialised);
    }
}

static void check(char *p, uint bytes, int write, int atomic, const void *pc) {
    if (!current) return;
    last_pc = pc;
    settle_write();
    report.accesses++;
    Event e = {.p = p, .bytes = bytes, .write = write, .atomic = atomic, .pc = pc};
    if (p >= threadgroup_memory && p < threadgroup_memory + sizeof threadgroup_cells / sizeof(Cell)) {
        check_threadgroup(&e);
        return;
    }
    Buffer *b = buffer_near(p);
    if (b) check_device(&e, b);
    else if (!on_own_stack(p) && !in_simd_state(p) && !(p >= library_start && p < library_end)) out_of_bounds(&e);
}

// 16 bytes may be two numbers of 8; a vector that is misaligned by 8 faults by itself.
static void check_aligned(char *p, uint bytes, int write, const void *pc) {
    if (current && (uint64_t)p % (bytes < 16 ? bytes : 8)) fail(0, pc, "undefined behaviour: misaligned pointer");
    check(p, bytes, write, 0, pc);
}

void check_atomic(char *p, uint bytes, int write, const void *pc) {
    if ((uint64_t)p % bytes) fail(0, pc, "misaligned atomic access of %u bytes", bytes);
    if (request->checked) check(p, bytes, write, 1, pc);
}

void __msl_atomic_read(uint64_t address, void *old, uint bytes) {
    check_atomic((char *)address, bytes, 0, __builtin_return_address(0));
    memcpy(old, (void *)address, bytes);
}

void __msl_atomic_write(uint64_t address, const void *value, uint bytes) {
    check_atomic((char *)address, bytes, 1, __builtin_return_address(0));
    memcpy((void *)address, value, bytes);
}

// --- what the instrumentation calls ----------------------------------------------------------------

#define HERE __builtin_return_address(0)
#define HOOKS(n)                                                                       \
    void __tsan_read##n(void *p) { check_aligned(p, n, 0, HERE); }                     \
    void __tsan_write##n(void *p) { check_aligned(p, n, 1, HERE); }                    \
    void __tsan_unaligned_read##n(void *p) { check(p, n, 0, 0, HERE); }                \
    void __tsan_unaligned_write##n(void *p) { check(p, n, 1, 0, HERE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_init(void) {}
void __tsan_func_entry(void *pc) {}
void __tsan_func_exit(void) {}

void *__tsan_memcpy(void *to, const void *from, size_t n) {
    check((char *)from, n, 0, 0, HERE);
    check(to, n, 1, 0, HERE);
    return memcpy(to, from, n);
}

void *__tsan_memmove(void *to, const void *from, size_t n) {
    check((char *)from, n, 0, 0, HERE);
    check(to, n, 1, 0, HERE);
    return memmove(to, from, n);
}

void *__tsan_memset(void *to, int value, size_t n) {
    check(to, n, 1, 0, HERE);
    return memset(to, value, n);
}
