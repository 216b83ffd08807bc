/*
 * world.c - virtual time, events, and processes as fibers.
 */
#define _GNU_SOURCE

#include "tests/sim/world.h"

#include "common/status.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#    include <sanitizer/asan_interface.h>
#    include <sanitizer/common_interface_defs.h>
#endif

#define STACK_BYTES ((size_t)256 << 10)
#define FIBERS_MAX  3
#define EVENTS_MAX  65536
#define LOOKS_MAX   20U   /* in a row: then a nap */
#define NAP_US      30    /* at least */
#define NAP_MAX_US  20000 /* deadlines are looked at between naps */

/*
 * Another stack is taken with makecontext(), once; from then on setjmp() saves a call for the signal mask at each turn. A sanitizer
 * wants to be told of each turn, and takes a jump between stacks for an error.
 */
#if defined(__SANITIZE_ADDRESS__)
#    define SWITCH(from, to, is_first) \
        ((void)(is_first), (void)swapcontext(&(from)->context, &(to)->context))
#else
#    define SWITCH(from, to, is_first)                             \
        do {                                                       \
            if (_setjmp((from)->jump) == 0) {                      \
                if (is_first) {                                    \
                    (void)swapcontext(&w.scratch, &(to)->context); \
                }                                                  \
                _longjmp((to)->jump, 1);                           \
            }                                                      \
        } while (0)
#endif

typedef struct place {
    ucontext_t context;
    jmp_buf jump;
} place_t;

typedef struct fiber {
    place_t place;
    bool has_begun;
    void *stack;
    void *fake_stack; /* the sanitizer's */
    sim_process_t *process;
    void *(*run)(void *arg);
    void *arg;
    int64_t wake_us;
    bool is_woken, is_done;
    char error[FV_ERROR_TEXT_BYTES]; /* fv_fail() keeps one a thread: here one a fiber */
} fiber_t;

struct sim_process {
    bool is_alive, has_ended;
    uint32_t number, host;
    int pid, exit_code;
    fiber_t fibers[FIBERS_MAX];
    uint32_t n_fibers;
    int64_t stopped_until_us, deadline_us;
    int deadline_code;
    uint32_t n_calls_left; /* 0: it lives on */
    uint32_t n_looks;
    sim_main_t main;
    void (*on_end)(uint32_t number, int code);
};

typedef struct event {
    int64_t at_us;
    uint64_t seq;
    void (*happen)(void *a, uint64_t b);
    void *a;
    uint64_t b;
    bool owns; /* `a` is freed if it never happens */
} event_t;

static struct {
    fv_random_t random;
    int64_t now_us;
    uint64_t next_seq;
    event_t events[EVENTS_MAX]; /* a heap */
    uint32_t n_events;
    sim_process_t processes[SIM_PROCESSES_MAX];
    sim_process_t *current;
    fiber_t *running;
    place_t home;
    ucontext_t scratch;
    int next_pid;
    void *free_stacks[SIM_PROCESSES_MAX * FIBERS_MAX];
    uint32_t n_free_stacks;
#if defined(__SANITIZE_ADDRESS__)
    void *fake_stack;
    const void *stack_bottom;
    size_t stack_bytes;
#endif
} w;

int64_t sim_pick(int64_t low, int64_t high)
{
    return fv_random_int(&w.random, low, high);
}

bool sim_chance(int64_t one_in)
{
    return sim_pick(1, one_in) == 1;
}

int64_t sim_now_us(void)
{
    return w.now_us;
}

/* ------------------------------------------------------------------ events */

static bool is_before(const event_t *a, const event_t *b)
{
    return (a->at_us != b->at_us) ? (a->at_us < b->at_us) : (a->seq < b->seq);
}

static void add_event(event_t event)
{
    uint32_t i = w.n_events++;

    FV_ASSERT(w.n_events < EVENTS_MAX);
    while ((i > 0) && is_before(&event, &w.events[(i - 1U) / 2U])) {
        w.events[i] = w.events[(i - 1U) / 2U];
        i = (i - 1U) / 2U;
    }
    w.events[i] = event;
}

void sim_at(int64_t at_us, void (*happen)(void *a, uint64_t b), void *a, uint64_t b)
{
    add_event((event_t){.at_us = at_us, .seq = w.next_seq++, .happen = happen, .a = a, .b = b});
}

void sim_at_owned(int64_t at_us, void (*happen)(void *a, uint64_t b), void *a, uint64_t b)
{
    add_event((event_t){
        .at_us = at_us, .seq = w.next_seq++, .happen = happen, .a = a, .b = b, .owns = true});
}

static event_t take_event(void)
{
    event_t first = w.events[0];
    event_t last = w.events[--w.n_events];
    uint32_t i = 0;

    for (uint32_t child = 1; child < w.n_events; child = 2U * i + 1U) {
        if ((child + 1U < w.n_events) && is_before(&w.events[child + 1U], &w.events[child])) {
            child++;
        }
        if (!is_before(&w.events[child], &last)) {
            break;
        }
        w.events[i] = w.events[child];
        i = child;
    }
    w.events[i] = last;
    return first;
}

/* ------------------------------------------------------------------ fibers */

static void *take_stack(void)
{
    if (w.n_free_stacks > 0) {
        return w.free_stacks[--w.n_free_stacks];
    }
    return sim_alloc(STACK_BYTES);
}

static void give_stack(void *stack)
{
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, STACK_BYTES);
#endif
    w.free_stacks[w.n_free_stacks++] = stack;
}

static void note_start(void *fake_stack)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &w.stack_bottom, &w.stack_bytes);
#else
    (void)fake_stack;
#endif
}

/* Back to the world; returns when the fiber is run again. is_last: never. */
static void leave(fiber_t *f, bool is_last)
{
    (void)snprintf(f->error, sizeof(f->error), "%s", fv_error_context());
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(is_last ? NULL : &f->fake_stack, w.stack_bottom, w.stack_bytes);
#else
    (void)is_last;
#endif
    SWITCH(&f->place, &w.home, false);
    note_start(f->fake_stack);
    if (strcmp(f->error, fv_error_context()) != 0) {
        (void)fv_fail(FV_ERR_UNKNOWN, "%s", f->error);
    }
}

static void fiber_main(void)
{
    fiber_t *f = w.running;

    note_start(NULL);
    (void)f->run(f->arg);
    f->is_done = true;
    leave(f, true);
}

static void enter(fiber_t *f)
{
    w.running = f;
    w.current = f->process;
    f->is_woken = false;
    f->process->n_looks = 0;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&w.fake_stack, f->stack, STACK_BYTES);
#endif
    bool is_first = !f->has_begun;
    f->has_begun = true;
    SWITCH(&w.home, &f->place, is_first);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(w.fake_stack, NULL, NULL);
#endif
    w.running = NULL;
    w.current = NULL;
}

static fiber_t *start_fiber(sim_process_t *p, void *(*run)(void *arg), void *arg)
{
    FV_ASSERT(p->n_fibers < FIBERS_MAX);
    fiber_t *f = &p->fibers[p->n_fibers++];

    *f = (fiber_t){.process = p, .run = run, .arg = arg, .stack = take_stack(), .is_woken = true};
    (void)getcontext(&f->place.context);
    f->place.context.uc_stack.ss_sp = f->stack;
    f->place.context.uc_stack.ss_size = STACK_BYTES;
    f->place.context.uc_link = NULL;
    makecontext(&f->place.context, fiber_main, 0);
    return f;
}

void *sim_fiber_start(void *(*run)(void *arg), void *arg)
{
    return start_fiber(w.current, run, arg);
}

void sim_fiber_join(void *fiber)
{
    const fiber_t *f = fiber;

    while (!f->is_done) {
        sim_block(SIM_NEVER);
    }
}

static uint64_t s_n_deaths; /* of sim_kill_after(), in all worlds */

uint64_t sim_n_deaths(void)
{
    return s_n_deaths;
}

void sim_call(void)
{
    sim_process_t *p = w.current;

    if ((w.running != NULL) && (p->n_calls_left > 0) && (--p->n_calls_left == 0)) {
        p->has_ended = true;
        p->exit_code = -1;
        s_n_deaths++;
        leave(w.running, true);
    }
}

void sim_block(int64_t until_us)
{
    FV_ASSERT(w.running != NULL);
    sim_call();
    w.running->wake_us = until_us;
    leave(w.running, false);
}

void sim_nap(void)
{
    int64_t until_us = w.now_us + NAP_MAX_US;

    if (w.running == NULL) {
        return;
    }
    if ((w.n_events > 0) && (w.events[0].at_us < until_us)) {
        until_us = w.events[0].at_us;
    }
    sim_block((until_us < w.now_us + NAP_US) ? (w.now_us + NAP_US) : until_us);
}

void sim_look(void)
{
    sim_call();
    if ((w.running != NULL) && (++w.current->n_looks > LOOKS_MAX)) {
        sim_nap();
    }
}

void sim_wake(sim_process_t *p)
{
    for (uint32_t i = 0; i < p->n_fibers; i++) {
        p->fibers[i].is_woken = true;
    }
}

/* ------------------------------------------------------------------ processes */

static void *run_main(void *arg)
{
    sim_process_t *p = arg;

    p->exit_code = p->main(p);
    p->has_ended = true;
    return NULL;
}

sim_process_t *sim_process_start(uint32_t number,
                                 uint32_t host,
                                 sim_main_t main,
                                 void (*on_end)(uint32_t number, int code))
{
    sim_process_t *p = &w.processes[number];

    FV_ASSERT(!p->is_alive);
    *p = (sim_process_t){.is_alive = true,
                         .number = number,
                         .host = host,
                         .pid = w.next_pid++,
                         .deadline_us = SIM_NEVER,
                         .main = main,
                         .on_end = on_end};
    (void)start_fiber(p, run_main, p);
    return p;
}

/* What it had is gone; others learn of it as the network has it. */
static void bury(sim_process_t *p, int code)
{
    p->is_alive = false;
    for (uint32_t i = 0; i < p->n_fibers; i++) {
        give_stack(p->fibers[i].stack);
    }
    p->n_fibers = 0;
    sim_sockets_drop(p);
    sim_mpi_drop(p);
    sim_memory_drop(p);
    if (p->on_end != NULL) {
        p->on_end(p->number, code);
    }
}

void sim_kill(uint32_t number)
{
    sim_process_t *p = &w.processes[number];

    if (p->is_alive && (p == w.current) && (w.running != NULL)) {
        sim_exit(-1);
    }
    if (p->is_alive) {
        bury(p, -1);
    }
}

void sim_kill_pid(int pid)
{
    for (uint32_t i = 0; i < SIM_PROCESSES_MAX; i++) {
        if (w.processes[i].is_alive && (w.processes[i].pid == pid)) {
            sim_kill(i);
        }
    }
}

void sim_kill_after(uint32_t number, uint32_t n_calls)
{
    w.processes[number].n_calls_left = n_calls;
}

void sim_exit(int code)
{
    w.current->exit_code = code;
    w.current->has_ended = true;
    leave(w.running, true);
    abort(); /* not reached */
}

void sim_set_deadline(int64_t at_us, int code)
{
    w.current->deadline_us = at_us;
    w.current->deadline_code = code;
}

void sim_stop_until(uint32_t number, int64_t until_us)
{
    w.processes[number].stopped_until_us = until_us;
}

int64_t sim_stopped_until(uint32_t number)
{
    return w.processes[number].stopped_until_us;
}

bool sim_process_is_alive(uint32_t number)
{
    return w.processes[number].is_alive;
}

int sim_process_pid(uint32_t number)
{
    return w.processes[number].pid;
}

uint32_t sim_process_number(const sim_process_t *p)
{
    return p->number;
}

uint32_t sim_process_host(uint32_t number)
{
    return w.processes[number].host;
}

sim_process_t *sim_process(uint32_t number)
{
    return w.processes[number].is_alive ? &w.processes[number] : NULL;
}

sim_process_t *sim_current(void)
{
    return w.current;
}

sim_process_t *sim_enter(sim_process_t *p)
{
    sim_process_t *before = w.current;

    w.current = p;
    return before;
}

/* ------------------------------------------------------------------ the story goes on */

static bool is_stopped(const sim_process_t *p)
{
    return p->stopped_until_us > w.now_us;
}

/* Who could run now; chance takes one of them. */
static fiber_t *pick_ready(void)
{
    fiber_t *picked = NULL;
    int64_t n = 0;

    for (uint32_t i = 0; i < SIM_PROCESSES_MAX; i++) {
        sim_process_t *p = &w.processes[i];
        for (uint32_t k = 0; p->is_alive && !is_stopped(p) && (k < p->n_fibers); k++) {
            fiber_t *f = &p->fibers[k];
            if (!f->is_done && (f->is_woken || (f->wake_us <= w.now_us)) && sim_chance(++n)) {
                picked = f;
            }
        }
    }
    return picked;
}

/* When a sleeper wants to go on, or a process's time is up. */
static int64_t next_wake_us(void)
{
    int64_t next_us = SIM_NEVER;

    for (uint32_t i = 0; i < SIM_PROCESSES_MAX; i++) {
        const sim_process_t *p = &w.processes[i];
        for (uint32_t k = 0; p->is_alive && (k < p->n_fibers); k++) {
            const fiber_t *f = &p->fibers[k];
            int64_t wake_us = f->is_woken ? w.now_us : f->wake_us;
            wake_us = (wake_us < p->stopped_until_us) ? p->stopped_until_us : wake_us;
            if (!f->is_done && (wake_us < next_us)) {
                next_us = wake_us;
            }
        }
        if (p->is_alive && !is_stopped(p) && (p->deadline_us < next_us)) {
            next_us = p->deadline_us;
        }
    }
    return next_us;
}

static void end_overdue(void)
{
    for (uint32_t i = 0; i < SIM_PROCESSES_MAX; i++) {
        sim_process_t *p = &w.processes[i];
        if (p->is_alive && !is_stopped(p) && (p->deadline_us <= w.now_us)) {
            bury(p, p->deadline_code);
        }
    }
}

bool sim_run(bool (*is_over)(void), int64_t until_us)
{
    while (!is_over()) {
        fiber_t *f = pick_ready();
        if (f != NULL) {
            sim_process_t *p = f->process;
            w.now_us += sim_pick(1, 10); /* what it computes takes time */
            enter(f);
            if (p->is_alive && f->is_done) {
                sim_wake(p); /* who joins it */
            }
            if (p->is_alive && p->has_ended) {
                bury(p, p->exit_code);
            }
        } else {
            int64_t wake_us = next_wake_us();
            int64_t event_us = (w.n_events > 0) ? w.events[0].at_us : SIM_NEVER;
            int64_t next_us = (wake_us < event_us) ? wake_us : event_us;
            if (next_us > until_us) {
                return false;
            }
            w.now_us = (next_us > w.now_us) ? next_us : w.now_us;
        }
        end_overdue();
        while ((w.n_events > 0) && (w.events[0].at_us <= w.now_us)) {
            event_t event = take_event();
            event.happen(event.a, event.b);
        }
    }
    return true;
}

void sim_world_begin(uint64_t seed)
{
    w.random.state = seed * 0x9e3779b97f4a7c15U + 1U;
    w.now_us = SIM_SECOND;
    w.next_seq = 0;
    w.n_events = 0;
    w.next_pid = 1000;
    sim_sockets_begin();
    sim_mpi_begin();
}

void sim_world_end(void)
{
    for (uint32_t i = 0; i < SIM_PROCESSES_MAX; i++) {
        w.processes[i].on_end = NULL;
        sim_kill(i);
    }
    sim_sockets_end();
    sim_mpi_end();
    while (w.n_events > 0) {
        event_t event = take_event();
        sim_free(event.owns ? event.a : NULL);
    }
    while (w.n_free_stacks > 0) {
        sim_free(w.free_stacks[--w.n_free_stacks]);
    }
}
