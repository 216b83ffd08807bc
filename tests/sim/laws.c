/*
 * laws.c - what must hold of every control message, and of memory and quotas when nothing is under way.
 *
 *   epochs    what rank 0 says carries an epoch that never goes back, and EPOCH a new one; what a process says neither
 *   answers   each message is answered at most once, in order, under the epoch it was sent in
 *   steps     a message of an older epoch is never answered under a newer one: it was not accepted
 *   commands  are sent when no step is under way
 *   ranks     in an epoch, a rank is one process
 *   turns     nobody is told what he does not expect (world_calls.c)
 */
#include "proto/control.h"
#include "tests/sim/job.h"

#include <string.h>

#define CONNECTIONS_MAX 1024
#define WINDOW          64 /* messages of a connection that wait for an answer, at most */
#define EPOCHS_MAX      128

typedef struct said {
    uint64_t seq;
    uint32_t epoch;
    uint16_t type;
} said_t;

typedef struct stream {
    fv_ctl_header_t header;
    size_t n_header;
    uint64_t n_left; /* of the body */
    uint32_t epoch;
    _Alignas(16) uint8_t body[sizeof(fv_ctl_hello_t)]; /* as much as is looked at */
    size_t n_body;
} stream_t;

typedef struct watched {
    bool is_watched;
    uint32_t process, n_start;
    stream_t streams[2]; /* by who speaks */
    said_t asked[WINDOW];
    uint32_t n_asked;
} watched_t;

static struct {
    watched_t connections[CONNECTIONS_MAX];
    int n_connections;
    uint32_t epoch, n_start;                         /* rank 0's */
    uint32_t rank_of[EPOCHS_MAX][SIM_PROCESSES_MAX]; /* 1 + process, of this start */
    uint32_t n_steps;                                /* not answered, of this epoch */
} l;

static void tap(int connection, int from_end, const void *data, size_t n_bytes);

void sim_laws_begin(void)
{
    sim_tap(tap);
    for (int i = 0; i < l.n_connections; i++) {
        l.connections[i].is_watched = false;
    }
    l.n_connections = 0;
    l.epoch = 0;
    l.n_start = 0;
}

void sim_laws_watch(int connection, uint32_t process)
{
    FV_ASSERT(connection < CONNECTIONS_MAX);
    memset(&l.connections[connection], 0, sizeof(l.connections[0]));
    l.connections[connection].is_watched = true;
    l.connections[connection].process = process;
    l.connections[connection].n_start = sim_job_n_starts();
    l.n_connections = (connection >= l.n_connections) ? (connection + 1) : l.n_connections;
    if (l.n_start != sim_job_n_starts()) {
        l.n_start = sim_job_n_starts();
        l.epoch = FV_MAIN_EPOCH;
        l.n_steps = 0;
        memset(l.rank_of, 0, sizeof(l.rank_of));
    }
}

static bool is_command(uint16_t type)
{
    return ((type >= FV_CTL_MODEL) && (type <= FV_CTL_CLOSE)) || (type == FV_CTL_KEEP) ||
           (type == FV_CTL_KEEP_END);
}

/* Rank 0 has begun to say something. */
static void on_asked(watched_t *c, const fv_ctl_header_t *h)
{
    if (h->epoch < l.epoch) {
        sim_fail("rank 0 speaks for epoch %u after %u", h->epoch, l.epoch);
    }
    if (h->type == FV_CTL_EPOCH) {
        if (h->epoch <= c->streams[0].epoch) {
            sim_fail("EPOCH %u to process %u in epoch %u", h->epoch, c->process,
                     c->streams[0].epoch);
        }
        c->n_asked = 0; /* what it had not answered, it never will */
    }
    if (h->epoch > l.epoch) {
        l.epoch = h->epoch;
        l.n_steps = 0;
        g_sim_counts.n_epochs++;
    }
    if (is_command(h->type) && (l.n_steps > 0)) {
        sim_fail("a command of type %u beside %u steps", h->type, l.n_steps);
    }
    if (h->type == FV_CTL_STOP) {
        return;
    }
    sim_faults_on_message(c->process, h->type);
    l.n_steps += (h->type == FV_CTL_STEP) ? 1U : 0U;
    FV_ASSERT(c->n_asked < WINDOW);
    c->asked[c->n_asked++] = (said_t){.seq = h->seq, .epoch = h->epoch, .type = h->type};
}

static void on_hello(const watched_t *c, uint32_t epoch, const fv_ctl_hello_t *hello)
{
    FV_ASSERT(epoch < EPOCHS_MAX);
    if (hello->rank >= SIM_PROCESSES_MAX) {
        sim_fail("HELLO of rank %u", hello->rank);
    }
    uint32_t *process = &l.rank_of[epoch][hello->rank];
    if ((*process != 0) && (*process != 1U + c->process)) {
        sim_fail("epoch %u: processes %u and %u are rank %u", epoch, *process - 1U, c->process,
                 hello->rank);
    }
    *process = 1U + c->process;
    sim_job_note_rank(hello->rank, c->process);
}

/* A process has said something whole. */
static void on_answer(watched_t *c, const fv_ctl_header_t *h, const uint8_t *body)
{
    uint32_t i = 0;

    while ((i < c->n_asked) && (c->asked[i].seq != h->seq) && (h->type != FV_CTL_HELLO)) {
        i++;
    }
    if (h->type == FV_CTL_HELLO) {
        on_hello(c, h->epoch, (const fv_ctl_hello_t *)(const void *)body);
        return;
    }
    const fv_ctl_done_t *done = (const fv_ctl_done_t *)(const void *)body;
    if (i == c->n_asked) { /* of an epoch that has gone: it had not heard of that */
        if (h->epoch >= c->streams[0].epoch) {
            sim_fail("process %u answers message %llu, which does not wait", c->process,
                     (unsigned long long)h->seq);
        }
        return;
    }
    if ((h->epoch != c->asked[i].epoch) && (done->error.status == FV_OK)) {
        sim_fail("process %u in epoch %u has done what it was told in epoch %u", c->process,
                 h->epoch, c->asked[i].epoch);
    }
    for (uint32_t k = 0; k < i; k++) {
        if ((c->asked[k].epoch == h->epoch) && (c->asked[k].type != FV_CTL_EPOCH)) {
            sim_fail("process %u answers message %llu before %llu", c->process,
                     (unsigned long long)h->seq, (unsigned long long)c->asked[k].seq);
        }
    }
    if ((c->asked[i].type == FV_CTL_STEP) && (c->asked[i].epoch == l.epoch) && (l.n_steps > 0)) {
        l.n_steps--;
    }
    memmove(&c->asked[i], &c->asked[i + 1U], (c->n_asked - i - 1U) * sizeof(c->asked[0]));
    c->n_asked--;
}

static void on_message(watched_t *c, int from_end, stream_t *s)
{
    if (s->header.epoch < s->epoch) {
        sim_fail("process %u: epoch %u after %u", (from_end == 0) ? 0U : c->process,
                 s->header.epoch, s->epoch);
    }
    g_sim_counts.n_messages++;
    if (from_end == 0) {
        on_asked(c, &s->header);
    }
    s->epoch = s->header.epoch;
}

static void tap(int connection, int from_end, const void *data, size_t n_bytes)
{
    watched_t *c = &l.connections[connection];
    const uint8_t *at = data;

    if (!c->is_watched || (c->n_start != sim_job_n_starts())) {
        return;
    }
    stream_t *s = &c->streams[from_end];
    while (n_bytes > 0) {
        if (s->n_header < sizeof(s->header)) {
            ((uint8_t *)&s->header)[s->n_header++] = *at++;
            n_bytes--;
            if (s->n_header < sizeof(s->header)) {
                continue;
            }
            s->n_left = s->header.body_bytes;
            s->n_body = 0;
            on_message(c, from_end, s);
        }
        size_t n = (s->n_left < n_bytes) ? (size_t)s->n_left : n_bytes;
        size_t n_kept = sizeof(s->body) - s->n_body;
        n_kept = (n < n_kept) ? n : n_kept;
        memcpy(s->body + s->n_body, at, n_kept);
        s->n_body += n_kept;
        at += n;
        n_bytes -= n;
        s->n_left -= n;
        if (s->n_left == 0) {
            if (from_end == 1) {
                on_answer(c, &s->header, s->body);
            }
            s->n_header = 0;
        }
    }
}

/* ------------------------------------------------------------------ when nothing is under way */

static void check_rank(const fv_process_t *coordinator, uint32_t rank, bool is_empty)
{
    const fv_process_t *p = sim_job_process(coordinator->crew.members[rank]);
    fv_ctl_memory_t memory;

    if ((p == NULL) || (p->worker == NULL)) {
        return;
    }
    fv_worker_memory(p->worker, &memory);
    if (is_empty && (memory.kv_bytes_free != memory.kv_bytes_total)) {
        sim_fail("rank %u: %llu of %llu KV bytes are free, and no session is left", rank,
                 (unsigned long long)memory.kv_bytes_free,
                 (unsigned long long)memory.kv_bytes_total);
    }
}

void sim_laws_check_quiet(bool is_empty)
{
    const fv_process_t *coordinator = sim_job_process(0);

    if (coordinator == NULL) {
        return;
    }
    for (uint32_t r = 0; r < (uint32_t)coordinator->n_ranks; r++) {
        check_rank(coordinator, r, is_empty);
    }
    for (uint32_t i = 0; is_empty && (i < SIM_PRINCIPALS); i++) {
        char name[] = {'p', (char)('0' + i), '\0'};
        const fv_principal_t *p = fv_auth_principal(coordinator->auth, name);
        if ((p->n_sessions != 0) || (p->kv_bytes != 0) || (p->kv_bytes_pending != 0) ||
            (atomic_load(&p->n_requests) != 0)) {
            sim_fail("%s: %llu sessions, %llu KV bytes, %llu pending, %u requests are charged to "
                     "it, and nothing is left",
                     name, (unsigned long long)p->n_sessions, (unsigned long long)p->kv_bytes,
                     (unsigned long long)p->kv_bytes_pending, atomic_load(&p->n_requests));
        }
    }
}
