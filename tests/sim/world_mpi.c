/*
 * world_mpi.c - the few functions of MPI that are used, between simulated processes.
 *
 * As Open MPI has it: messages of a pair and a tag keep their order on a communicator; nobody is told that a peer is dead, what was
 * posted pends for ever, and a message may still come into a buffer long after its step was given up. Small messages leave at
 * once, of large ones the sender's memory is read when they are taken.
 */
#include "common/status.h"
#include "tests/sim/world.h"

#include <mpi.h>

#include <string.h>

#define EAGER_BYTES 512
#define COMMS_MAX   64
#define TYPES_MAX   256
#define GROUPS_MAX  32

typedef struct comm {
    int tag;
    uint32_t n;
    uint32_t members[SIM_PROCESSES_MAX]; /* processes by rank */
    int pids[SIM_PROCESSES_MAX];         /* of those, as far as they have come */
    uint32_t n_here;
} comm_t;

typedef struct group {
    bool is_used;
    uint32_t n;
    uint32_t members[SIM_PROCESSES_MAX];
} group_t;

/* Where bytes lie. */
typedef struct blocks {
    uint32_t n;
    size_t n_bytes;
    struct {
        uint8_t *at;
        size_t n_bytes;
    } list[];
} blocks_t;

typedef struct request {
    struct request *next; /* of all */
    const sim_process_t *owner;
    blocks_t *blocks;
    const comm_t *comm;
    uint32_t peer; /* rank */
    int tag;
    bool is_send, is_done, is_matched;
    size_t n_bytes; /* that came */
    struct message *message;
} request_t;

/* On its way, or here and not expected yet. */
typedef struct message {
    struct message *next;
    const comm_t *comm;
    uint32_t from, to; /* ranks */
    int tag;
    request_t *sender; /* of a large one, until it is taken; NULL: data has it */
    bool is_here;
    uint64_t seq;
    size_t n_bytes;
    uint8_t *data;
} message_t;

static struct {
    comm_t comms[COMMS_MAX];
    int n_comms;
    group_t groups[GROUPS_MAX];
    blocks_t *types[TYPES_MAX];
    request_t *requests;
    message_t *messages;
    int64_t last_us[SIM_PROCESSES_MAX][SIM_PROCESSES_MAX];
    uint64_t next_seq;
    void (*on_comm)(uint32_t number);
} m;

void sim_mpi_on_comm(void (*on_comm)(uint32_t number))
{
    m.on_comm = on_comm;
}

static void *to_handle(void *object)
{
    return object;
}

/* ------------------------------------------------------------------ communicators */

int MPI_Comm_group(MPI_Comm comm, MPI_Group *out)
{
    (void)comm; /* the world alone is asked for */
    *out = MPI_GROUP_EMPTY;
    return MPI_SUCCESS;
}

int MPI_Group_incl(MPI_Group group, int n, const int ranks[], MPI_Group *out)
{
    (void)group;
    for (int i = 0; i < GROUPS_MAX; i++) {
        group_t *g = &m.groups[i];
        if (!g->is_used) {
            g->is_used = true;
            g->n = (uint32_t)n;
            for (int k = 0; k < n; k++) {
                g->members[k] = (uint32_t)ranks[k];
            }
            *out = to_handle(g);
            return MPI_SUCCESS;
        }
    }
    return MPI_ERR_OTHER;
}

int MPI_Group_free(MPI_Group *group)
{
    if (*group != MPI_GROUP_EMPTY) {
        ((group_t *)to_handle(*group))->is_used = false;
    }
    *group = MPI_GROUP_NULL;
    return MPI_SUCCESS;
}

static sim_process_t *member(const comm_t *c, uint32_t rank);

/* Who has come to it lives: nobody joins what a job before this one has left unfinished. */
static bool is_alive(const comm_t *c)
{
    for (uint32_t i = 0; i < c->n; i++) {
        if ((c->pids[i] != 0) && (member(c, i) == NULL)) {
            return false;
        }
    }
    return true;
}

/* The one that its other members have begun to make, or a new one. */
static comm_t *find_comm(const group_t *g, int tag, uint32_t own)
{
    for (int i = 0; i < m.n_comms; i++) {
        comm_t *c = &m.comms[i];
        if ((c->tag == tag) && (c->n == g->n) && (c->n_here < c->n) && (c->pids[own] == 0) &&
            is_alive(c) && (memcmp(c->members, g->members, g->n * sizeof(g->members[0])) == 0)) {
            return c;
        }
    }
    FV_ASSERT(m.n_comms < COMMS_MAX);
    comm_t *c = &m.comms[m.n_comms++];
    *c = (comm_t){.tag = tag, .n = g->n};
    memcpy(c->members, g->members, sizeof(c->members));
    return c;
}

/* Only its members take part; it can not be given up. */
int MPI_Comm_create_group(MPI_Comm comm, MPI_Group group, int tag, MPI_Comm *out)
{
    const group_t *g = to_handle(group);
    sim_process_t *own = sim_current();
    uint32_t rank = 0;

    (void)comm;
    while ((rank < g->n) && (g->members[rank] != sim_process_number(own))) {
        rank++;
    }
    FV_ASSERT(rank < g->n);
    comm_t *c = find_comm(g, tag, rank);
    c->pids[rank] = sim_process_pid(sim_process_number(own));
    c->n_here++;
    sim_call();
    while (c->n_here < c->n) {
        sim_block(sim_now_us() + 1000);
    }
    sim_block(sim_now_us() + sim_pick(10, 500));
    if (m.on_comm != NULL) {
        m.on_comm(sim_process_number(own));
    }
    *out = to_handle(c);
    return MPI_SUCCESS;
}

int MPI_Comm_set_errhandler(MPI_Comm comm, MPI_Errhandler handler)
{
    (void)comm;
    (void)handler;
    return MPI_SUCCESS;
}

int MPI_Error_string(int code, char *out, int *n)
{
    (void)code;
    *out = '\0';
    *n = 0;
    return MPI_SUCCESS;
}

/* ------------------------------------------------------------------ types */

int MPI_Get_address(const void *at, MPI_Aint *out)
{
    *out = (MPI_Aint)(intptr_t)at;
    return MPI_SUCCESS;
}

static blocks_t *new_blocks(uint32_t n)
{
    blocks_t *b = sim_alloc(sizeof(*b) + n * sizeof(b->list[0]));

    b->n = n;
    b->n_bytes = 0;
    return b;
}

int MPI_Type_create_hindexed(int n,
                             const int lengths[],
                             const MPI_Aint places[],
                             MPI_Datatype base,
                             MPI_Datatype *out)
{
    blocks_t *b = new_blocks((uint32_t)n);

    (void)base;
    for (int i = 0; i < n; i++) {
        b->list[i].at = (uint8_t *)(intptr_t)places[i]; /* NOLINT: from MPI_BOTTOM */
        b->list[i].n_bytes = (size_t)lengths[i];
        b->n_bytes += (size_t)lengths[i];
    }
    for (int i = 0; i < TYPES_MAX; i++) {
        if (m.types[i] == NULL) {
            m.types[i] = b;
            *out = to_handle(b);
            return MPI_SUCCESS;
        }
    }
    return MPI_ERR_OTHER;
}

int MPI_Type_commit(MPI_Datatype *type)
{
    (void)type;
    return MPI_SUCCESS;
}

int MPI_Type_free(MPI_Datatype *type)
{
    for (int i = 0; i < TYPES_MAX; i++) {
        if (m.types[i] == to_handle(*type)) {
            sim_free(m.types[i]);
            m.types[i] = NULL;
        }
    }
    *type = MPI_DATATYPE_NULL;
    return MPI_SUCCESS;
}

static blocks_t *blocks_of(void *data, int count, MPI_Datatype type)
{
    if (type != MPI_BYTE) { /* one of a type over absolute addresses */
        const blocks_t *from = to_handle(type);
        blocks_t *b = new_blocks(from->n);
        memcpy(b, from, sizeof(*b) + from->n * sizeof(b->list[0]));
        return b;
    }
    blocks_t *b = new_blocks(1);
    b->list[0].at = data;
    b->list[0].n_bytes = (size_t)count;
    b->n_bytes = (size_t)count;
    return b;
}

/* ------------------------------------------------------------------ messages */

static uint8_t *gather(const blocks_t *b)
{
    uint8_t *data = sim_alloc(b->n_bytes + 1U);
    size_t n = 0;

    for (uint32_t i = 0; i < b->n; i++) {
        memcpy(data + n, b->list[i].at, b->list[i].n_bytes);
        n += b->list[i].n_bytes;
    }
    return data;
}

static void scatter(const blocks_t *b, const uint8_t *data, size_t n_bytes)
{
    for (uint32_t i = 0; (i < b->n) && (n_bytes > 0); i++) {
        size_t n = (b->list[i].n_bytes < n_bytes) ? b->list[i].n_bytes : n_bytes;
        memcpy(b->list[i].at, data, n);
        data += n;
        n_bytes -= n;
    }
}

static sim_process_t *member(const comm_t *c, uint32_t rank)
{
    sim_process_t *p = sim_process(c->members[rank]);

    return ((p != NULL) && (sim_process_pid(c->members[rank]) == c->pids[rank])) ? p : NULL;
}

static void drop_message(message_t *message)
{
    message_t **at = &m.messages;

    while (*at != message) {
        at = &(*at)->next;
    }
    *at = message->next;
    if (message->sender != NULL) {
        message->sender->message = NULL;
    }
    sim_free(message->data);
    sim_free(message);
}

/* Into the buffer of the request that waits for it. */
static void take(message_t *message, request_t *r)
{
    if (message->sender != NULL) { /* its memory is read now */
        message->data = gather(message->sender->blocks);
        message->sender->is_done = true;
        sim_wake((sim_process_t *)(uintptr_t)message->sender->owner);
    }
    FV_ASSERT(message->n_bytes <= r->blocks->n_bytes);
    scatter(r->blocks, message->data, message->n_bytes);
    r->n_bytes = message->n_bytes;
    r->is_done = true;
    sim_wake((sim_process_t *)(uintptr_t)r->owner);
    drop_message(message);
}

static bool fits(const message_t *message, const request_t *r)
{
    return !r->is_send && !r->is_done && message->is_here && (r->comm == message->comm) &&
           (r->owner == member(message->comm, message->to)) && (r->peer == message->from) &&
           (r->tag == message->tag);
}

/* The oldest message for the oldest request, as long as there are any. Requests are listed oldest first, and so are messages. */
static void match(const comm_t *c, uint32_t to)
{
    for (message_t *message = m.messages; message != NULL;) {
        message_t *next = message->next;
        if ((message->comm == c) && (message->to == to) && message->is_here) {
            for (request_t *r = m.requests; r != NULL; r = r->next) {
                if (fits(message, r)) {
                    take(message, r);
                    break;
                }
            }
        }
        message = next;
    }
}

static void arrive(void *a, uint64_t seq)
{
    (void)a;
    for (message_t *message = m.messages; message != NULL; message = message->next) {
        if (message->seq == seq) {
            if (member(message->comm, message->to) ==
                NULL) { /* nobody takes it: what was sent pends */
                drop_message(message);
                return;
            }
            message->is_here = true;
            match(message->comm, message->to);
            return;
        }
    }
}

static request_t *
new_request(void *data, int count, MPI_Datatype type, int peer, int tag, MPI_Comm comm)
{
    request_t *r = sim_alloc(sizeof(*r));
    request_t **at = &m.requests;

    *r = (request_t){.owner = sim_current(),
                     .blocks = blocks_of(data, count, type),
                     .comm = to_handle(comm),
                     .peer = (uint32_t)peer,
                     .tag = tag};
    while (*at != NULL) {
        at = &(*at)->next;
    }
    *at = r;
    return r;
}

static void drop_request(request_t *r)
{
    request_t **at = &m.requests;

    while (*at != r) {
        at = &(*at)->next;
    }
    *at = r->next;
    if (r->message != NULL) {
        r->message->sender = NULL;
    }
    sim_free(r->blocks);
    sim_free(r);
}

static uint32_t own_rank(const comm_t *c)
{
    uint32_t rank = 0;

    while (c->members[rank] != sim_process_number(sim_current())) {
        rank++;
        FV_ASSERT(rank < c->n);
    }
    return rank;
}

int MPI_Isend(const void *data,
              int count,
              MPI_Datatype type,
              int to,
              int tag,
              MPI_Comm comm,
              MPI_Request *out)
{
    sim_call();
    request_t *r = new_request((void *)(uintptr_t)data, count, type, to, tag, comm);
    const comm_t *c = r->comm;
    message_t *message = sim_alloc(sizeof(*message));
    message_t **at = &m.messages;
    uint32_t own = sim_process_number(sim_current());
    uint32_t peer = c->members[to];
    bool is_eager = r->blocks->n_bytes <= EAGER_BYTES;

    r->is_send = true;
    r->is_done = is_eager;
    *message = (message_t){.comm = c,
                           .from = own_rank(c),
                           .to = (uint32_t)to,
                           .tag = tag,
                           .seq = ++m.next_seq,
                           .n_bytes = r->blocks->n_bytes,
                           .sender = is_eager ? NULL : r,
                           .data = is_eager ? gather(r->blocks) : NULL};
    r->message = is_eager ? NULL : message;
    while (*at != NULL) {
        at = &(*at)->next;
    }
    *at = message;
    int64_t at_us = sim_arrival_us(sim_process_host(own), sim_process_host(peer));
    int64_t *last_us = &m.last_us[own][peer];
    *last_us = (at_us > *last_us) ? at_us : (*last_us + 1);
    sim_at(*last_us, arrive, NULL, message->seq);
    *out = to_handle(r);
    return MPI_SUCCESS;
}

int MPI_Irecv(void *data,
              int count,
              MPI_Datatype type,
              int from,
              int tag,
              MPI_Comm comm,
              MPI_Request *out)
{
    sim_call();
    request_t *r = new_request(data, count, type, from, tag, comm);

    *out = to_handle(r);
    match(r->comm, own_rank(r->comm));
    return MPI_SUCCESS;
}

static bool is_done(MPI_Request *request, MPI_Status *status)
{
    if (*request == MPI_REQUEST_NULL) {
        return true;
    }
    request_t *r = to_handle(*request);
    if (!r->is_done) {
        return false;
    }
    if (status != MPI_STATUS_IGNORE) {
        memset(status, 0, sizeof(*status));
        status->MPI_SOURCE = (int)r->peer;
        status->MPI_TAG = r->tag;
        status->_ucount = r->n_bytes;
    }
    drop_request(r);
    *request = MPI_REQUEST_NULL;
    return true;
}

int MPI_Test(MPI_Request *request, int *out_is_done, MPI_Status *status)
{
    *out_is_done = is_done(request, status) ? 1 : 0;
    if (*out_is_done == 0) {
        sim_look();
    }
    return MPI_SUCCESS;
}

int MPI_Testall(int n, MPI_Request requests[], int *out_is_done, MPI_Status statuses[])
{
    *out_is_done = 1;
    for (int i = 0; i < n; i++) {
        const request_t *r = (requests[i] == MPI_REQUEST_NULL) ? NULL : to_handle(requests[i]);
        if ((r != NULL) && !r->is_done) {
            *out_is_done = 0;
        }
    }
    if (*out_is_done == 0) { /* asked again at once */
        sim_nap();
        return MPI_SUCCESS;
    }
    for (int i = 0; i < n; i++) {
        (void)is_done(&requests[i],
                      (statuses == MPI_STATUSES_IGNORE) ? MPI_STATUS_IGNORE : &statuses[i]);
    }
    return MPI_SUCCESS;
}

int MPI_Get_elements_x(const MPI_Status *status, MPI_Datatype type, MPI_Count *out)
{
    (void)type;
    *out = (MPI_Count)status->_ucount;
    return MPI_SUCCESS;
}

/* ------------------------------------------------------------------ life */

void sim_mpi_drop(const sim_process_t *process)
{
    uint32_t number = sim_process_number(process);

    for (uint32_t i = 0; i < SIM_PROCESSES_MAX;
         i++) { /* another one comes with other connections */
        m.last_us[number][i] = 0;
        m.last_us[i][number] = 0;
    }
    for (message_t *message = m.messages; message != NULL;) {
        message_t *next = message->next;
        bool is_its = (message->sender != NULL) && (message->sender->owner == process);
        bool is_for_it = (message->comm->members[message->to] == number) &&
                         (message->comm->pids[message->to] == sim_process_pid(number));
        if (is_its || is_for_it) {
            drop_message(message); /* of a large one nothing was sent yet */
        }
        message = next;
    }
    for (request_t *r = m.requests; r != NULL;) {
        request_t *next = r->next;
        if (r->owner == process) {
            drop_request(r);
        }
        r = next;
    }
}

void sim_mpi_begin(void)
{
    memset(&m, 0, sizeof(m));
}

void sim_mpi_end(void)
{
    while (m.messages != NULL) {
        drop_message(m.messages);
    }
    while (m.requests != NULL) {
        drop_request(m.requests);
    }
    for (int i = 0; i < TYPES_MAX; i++) {
        sim_free(m.types[i]);
        m.types[i] = NULL;
    }
}
