// Device buffers between guards, and threadgroup memory.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

enum { PAGE = 4096, GUARD = 1 << 20 };
// Between threadgroup variables lies a red zone, so the arena is larger than what a kernel may use.
enum { RED_ZONE = 64, MAX_VARIABLES = 256, ARENA = THREADGROUP_LIMIT + MAX_VARIABLES * RED_ZONE };

Buffer buffers[MAX_BUFFERS];
uint buffer_count;

// Copies `source` into a mapping of its own, flush against the guard behind it. With an alignment below 16 the
// address is odd multiple of it, as that of a slice on a Mac may be.
uint64_t msl_buffer(const void *source, uint64_t bytes, uint writable, uint poison, uint alignment) {
    size_t inner = (bytes + 16 + PAGE - 1) / PAGE * PAGE;
    char *map = mmap(0, inner + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return 0;
    char *data = map + GUARD + (inner - bytes) / 16 * 16;
    if (alignment < 16) data = data + alignment + bytes <= map + GUARD + inner ? data + alignment : data - 16 + alignment;
    mprotect(map + GUARD, inner, PROT_READ | PROT_WRITE);
    memset(map + GUARD, poison, inner);
    if (source) memcpy(data, source, bytes);
    if (!writable) mprotect(map + GUARD, inner, PROT_READ);
    buffers[buffer_count++] = (Buffer){.data = data, .bytes = bytes, .map = map, .map_bytes = inner + 2 * GUARD,
                                       .filling = poison, .writable = writable, .initialised = source != 0};
    return (uint64_t)data;
}

// Whether the poison around a buffer is untouched.
int msl_intact(uint i) {
    const Buffer *b = &buffers[i];
    for (char *p = b->map + GUARD; p < b->map + b->map_bytes - GUARD; p++) {
        if (p == b->data) p += b->bytes;
        if (p < b->map + b->map_bytes - GUARD && *(uchar *)p != b->filling) return 0;
    }
    return 1;
}

void msl_traffic(uint i, uint64_t *out) { memcpy(out, buffers[i].traffic, sizeof buffers[i].traffic); }

void msl_free(void) {
    for (uint i = 0; i < buffer_count; i++) {
        munmap(buffers[i].map, buffers[i].map_bytes);
        free(buffers[i].shadow);
        free(buffers[i].groups_read);
        free(buffers[i].groups_written);
    }
    buffer_count = 0;
}

// The buffer whose mapping, guards included, contains p.
Buffer *buffer_near(const char *p) {
    static uint last;  // accesses come in runs
    if (last < buffer_count && p >= buffers[last].map && p < buffers[last].map + buffers[last].map_bytes) {
        return &buffers[last];
    }
    for (uint i = 0; i < buffer_count; i++) {
        if (p >= buffers[i].map && p < buffers[i].map + buffers[i].map_bytes) return &buffers[last = i];
    }
    return 0;
}

// --- threadgroup memory ----------------------------------------------------------------------------

static char arena[ARENA] __attribute__((aligned(PAGE)));
char *const threadgroup_memory = arena;
static Variable variables[MAX_VARIABLES];
static uint variable_count, arena_used;
static size_t bytes_used;

void begin_memory(void) {
    variable_count = arena_used = 0;
    memset(arena, request->poison, ARENA);
}

void begin_group_memory(void) {
    memset(arena, request->poison, arena_used);
    variable_count = arena_used = 0;
    bytes_used = 0;
}

uint64_t __msl_threadgroup_variable(uint id, uint64_t bytes, uint align) {
    for (uint i = 0; i < variable_count; i++) {
        if (variables[i].id == id) return (uint64_t)arena + variables[i].offset;
    }
    if (id >= 1000) bytes = request->threadgroup_bytes[id - 1000];
    if (align < 16) align = 16;
    uint offset = (arena_used + align - 1) / align * align;
    bytes_used += (bytes + 15) / 16 * 16;
    if (bytes_used > THREADGROUP_LIMIT || variable_count == MAX_VARIABLES) {
        fail(0, 0, "threadgroup memory of %zu bytes, at most %d", bytes_used, THREADGROUP_LIMIT);
    }
    if (bytes_used > report.threadgroup_peak) report.threadgroup_peak = bytes_used;
    variables[variable_count++] = (Variable){id, offset, bytes};
    arena_used = offset + bytes + RED_ZONE;
    return (uint64_t)arena + offset;
}

const Variable *variable_around(long offset, size_t bytes) {
    for (uint i = 0; i < variable_count; i++) {
        long start = variables[i].offset, end = start + (long)variables[i].bytes;
        if (offset >= start && offset + (long)bytes <= end) return &variables[i];
    }
    return 0;
}

// Unchecked runs notice an overrun only here.
void end_group_memory(void) {
    for (uint i = 0; i < variable_count; i++) {
        const uchar *end = (uchar *)arena + variables[i].offset + variables[i].bytes;
        for (uint k = 0; k < RED_ZONE; k++) {
            if (end[k] != (uchar)request->poison) {
                fail(0, 0, "write past the end of threadgroup variable {V%u} of %zu bytes, at +%u", variables[i].id,
                     variables[i].bytes, k);
            }
        }
    }
}

static const char *describe_threadgroup(long offset, size_t bytes, char *text, size_t size) {
    const Variable *nearest = 0;
    for (uint i = 0; i < variable_count; i++) {
        if ((long)variables[i].offset <= offset) nearest = &variables[i];
    }
    if (!nearest) {
        snprintf(text, size, "threadgroup memory, before every variable");
    } else {
        long at = offset - nearest->offset;
        snprintf(text, size, "threadgroup variable {V%u}: bytes %ld to %ld of %zu", nearest->id, at,
                 at + (long)bytes - 1, nearest->bytes);
    }
    return text;
}

// In words, an address that a kernel must not use.
const char *describe_address(const char *p, size_t bytes, char *text, size_t size) {
    if (p >= arena - RED_ZONE && p < arena + ARENA) return describe_threadgroup(p - arena, bytes, text, size);
    Buffer *nearest = 0;
    long best = 0;
    for (uint i = 0; i < buffer_count; i++) {
        long before = buffers[i].data - p, behind = p - (buffers[i].data + buffers[i].bytes);
        long distance = before > behind ? before : behind;
        if (!nearest || distance < best) {
            nearest = &buffers[i];
            best = distance;
        }
    }
    if (in_stacks(p)) {
        snprintf(text, size, "the stack of another thread");
    } else if (!nearest) {
        snprintf(text, size, "no buffer");
    } else {
        long at = p - nearest->data;
        snprintf(text, size, "buffer {B%ld}: bytes %ld to %ld of %zu", (long)(nearest - buffers), at,
                 at + (long)bytes - 1, nearest->bytes);
    }
    return text;
}
