// The way out when a kernel does something wrong: from a check, from a signal, or because it never ends.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "runtime.h"

const Request *request;
Report report;
const void *last_pc;
static void *escape[5];  // of __builtin_setjmp

// --- reporting -------------------------------------------------------------------------------------

static void copy3(uint to[3], uint3 from) {
    to[0] = from.x;
    to[1] = from.y;
    to[2] = from.z;
}

// Offset in the library of the kernel; 0 outside of it.
static uint offset_of(const void *pc) {
    Dl_info kernel, here;
    if (!pc || !dladdr((void *)request->kernel, &kernel) || !dladdr(pc, &here)) return 0;
    return here.dli_fbase == kernel.dli_fbase ? (uint)((char *)pc - (char *)here.dli_fbase) : 0;
}

_Noreturn void fail(int line, const void *pc, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(report.reason, sizeof report.reason, format, arguments);
    va_end(arguments);
    report.failed = 1;
    report.line = line;
    report.pc = offset_of(pc);
    report.has_thread = current != 0;
    if (current) {
        copy3(report.thread, current->position.thread_position_in_threadgroup);
        copy3(report.group, current->position.threadgroup_position_in_grid);
    }
    current = 0;
    __builtin_longjmp(escape, 1);
}

// --- signals ---------------------------------------------------------------------------------------

// Kinds of undefined behaviour, by the number that clang puts into the trap instruction.
static const char *const undefined[] = {
    "integer overflow in an addition", "unreachable code", "call of a wrong function", "integer division by zero or overflow",
    "dynamic type", "float out of range of the integer type", "function type", "implicit conversion", "invalid builtin",
    "invalid cast", "invalid value", "missing return", "integer overflow in a multiplication",
    "integer overflow in a negation", "null argument", "null return", "null argument", "null return",
    "index out of bounds of a local array", "pointer overflow", "shift by too many bits or of a negative number",
    "integer overflow in a subtraction", "misaligned pointer"};

// clang traps with ud1: 67 0f b9 40 KK, or 67 0f b9 00 for kind 0.
static const char *undefined_behaviour(const uchar *ip) {
    if (ip[0] != 0x67 || ip[1] != 0x0f || ip[2] != 0xb9) return "trap";
    uint kind = ip[3] ? ip[4] : 0;
    return kind < sizeof undefined / sizeof *undefined ? undefined[kind] : "undefined behaviour";
}

static void on_fault(int signal_number, siginfo_t *info, void *context) {
    char text[200];
    if (!current && signal_number != SIGVTALRM) {  // a bug of the scheduler, not of the kernel
        signal(signal_number, SIG_DFL);
        return;
    }
    const greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uchar *pc = (uchar *)registers[REG_RIP];
    const char *address = info->si_addr;
    // One further, as a return address would be. A stub that jumps to another library has no line, its caller has.
    const int in_stub = pc[0] == 0xff && pc[1] == 0x25;
    const void *behind = in_stub ? *(void **)registers[REG_RSP] : pc + 1;
    if (signal_number == SIGVTALRM) fail(0, offset_of(pc) ? behind : last_pc, "does not end within %u s", request->timeout_s);
    if (signal_number == SIGFPE) fail(0, behind, "integer division by zero or overflow");
    if (signal_number == SIGILL) fail(0, behind, "undefined behaviour: %s", undefined_behaviour(pc));
    if (in_stacks(address)) fail(0, behind, "thread stack overflow");
    // The processor gives no address for these.
    if (info->si_code == SI_KERNEL) fail(0, behind, "undefined behaviour: misaligned pointer, or no address at all");
    Buffer *b = buffer_near(address);
    if (b && !b->writable && address >= b->data && address < b->data + b->bytes) {
        fail(0, behind, "write to input {B%ld}, byte %ld", (long)(b - buffers), (long)(address - b->data));
    }
    fail(0, behind, "access out of bounds: %s", describe_address(address, 1, text, sizeof text));
}

enum { SIGNALS = 5 };
static const int signals[SIGNALS] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
static struct sigaction before[SIGNALS];
static stack_t stack_before;
static char signal_stack[64 * 1024];
static timer_t timer;

// Counts the processor time of this thread, and tells no other thread.
static void start_timer(void) {
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGVTALRM};
    event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    struct itimerspec limit = {.it_value.tv_sec = request->timeout_s};
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
    timer_settime(timer, 0, &limit, 0);
}

void install_handlers(void) {
    // A fault on a fiber's stack needs another stack, and the handler leaves by a jump, so nothing may stay blocked.
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    stack_t stack = {.ss_sp = signal_stack, .ss_size = sizeof signal_stack};
    sigaltstack(&stack, &stack_before);
    for (int i = 0; i < SIGNALS; i++) sigaction(signals[i], &action, &before[i]);
    start_timer();
}

void remove_handlers(void) {
    timer_delete(timer);
    for (int i = 0; i < SIGNALS; i++) sigaction(signals[i], &before[i], 0);
    sigaltstack(&stack_before, 0);
}

// --- the whole dispatch ----------------------------------------------------------------------------

enum { FLUSH_TO_ZERO = 0x8000, DENORMALS_ARE_ZERO = 0x0040 };

// Runs what `wanted` describes; on return `out` says how it went.
void msl_dispatch(const Request *wanted, Report *out) {
    request = wanted;
    last_pc = 0;
    report = (Report){0};
    make_stacks();
    begin_memory();
    begin_checker();
    install_handlers();
    uint control = __builtin_ia32_stmxcsr();
    if (!__builtin_setjmp(escape)) {
        if (request->flush_denormals) __builtin_ia32_ldmxcsr(control | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO);
        run_grid();
    }
    current = 0;
    __builtin_ia32_ldmxcsr(control);
    remove_handlers();
    *out = report;
}

// float -> bfloat, ties to even: a helper of the compiler's library, which kernels are not linked with.
__bf16 __truncsfbf2(float x) {
    uint32_t bits;
    uint16_t rounded;
    __bf16 result;
    memcpy(&bits, &x, sizeof bits);
    int nan = (bits & 0x7fffffff) > 0x7f800000;
    rounded = nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    memcpy(&result, &rounded, sizeof result);
    return result;
}
