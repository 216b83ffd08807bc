/*
 * main_repair.c - from one epoch to the next.
 */
#include "coord/main_repair.h"

#include "common/deadline.h"
#include "common/frame.h"
#include "common/log.h"
#include "coord/main_recruit.h"
#include "coord/main_store.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ANSWER_MS 5000

/* Open MPI's MPI_Comm_create_group() sends under the caller's tag as it is: none of a step's (FV_TAG_*). */
#define TAG_EPOCHS (1U << 16U)

void fv_crew_init(fv_crew_t *crew, uint32_t n_ranks, uint32_t n_world, uint32_t epoch)
{
    crew->n_ranks = n_ranks;
    crew->n_world = n_world;
    crew->epoch = epoch;
    crew->base = MPI_COMM_WORLD;
    for (uint32_t i = 0; i < n_world; i++) {
        crew->members[i] = i;
        crew->seats[i] = i;
        atomic_store(&crew->rank_of[i], (i < n_ranks) ? i : FV_CREW_NOBODY);
        atomic_store(&crew->is_spare[i], i >= n_ranks);
    }
}

/* Of the members that base has. */
static fv_status_t make_present(fv_crew_t *crew, MPI_Comm *out)
{
    MPI_Group base = MPI_GROUP_NULL;
    MPI_Group group = MPI_GROUP_NULL;
    int seats[FV_RANKS_MAX];
    int n = 0;

    for (uint32_t r = 0; r < crew->n_ranks; r++) {
        if (crew->is_recruit[r] == 0U) {
            seats[n++] = (int)crew->seats[crew->members[r]];
        }
    }
    int rc = MPI_Comm_group(crew->base, &base);
    if (rc == MPI_SUCCESS) {
        rc = MPI_Group_incl(base, n, seats, &group);
        (void)MPI_Group_free(&base);
    }
    if (rc == MPI_SUCCESS) {
        rc = MPI_Comm_create_group(crew->base, group, (int)(TAG_EPOCHS + crew->epoch), out);
        (void)MPI_Group_free(&group);
    }
    if (rc != MPI_SUCCESS) {
        return fv_fail(FV_ERR_MPI, "epoch %u: MPI error %d", crew->epoch, rc);
    }
    (void)MPI_Comm_set_errhandler(*out, MPI_ERRORS_RETURN);
    return FV_OK;
}

static bool has_recruits(const fv_crew_t *crew)
{
    return memchr(crew->is_recruit, 1, crew->n_ranks) != NULL;
}

fv_status_t fv_crew_make_comm(fv_crew_t *crew, uint32_t own_rank)
{
    MPI_Comm present = MPI_COMM_NULL;

    FV_RETURN_IF_ERR(make_present(crew, &present));
    if (has_recruits(crew)) {
        return fv_recruit_start(crew, present, own_rank);
    }
    crew->comm = present;
    return FV_OK;
}

void fv_crew_note_silent(fv_crew_t *crew, uint32_t process, uint32_t silent_ms)
{
    uint32_t rank = atomic_load(&crew->rank_of[process]);

    if (rank != FV_CREW_NOBODY) {
        fv_link_declare_silent(crew->link, rank, silent_ms);
    } else if (atomic_exchange(&crew->is_spare[process], false)) {
        fv_warn("spare %u is gone: not heard for %u ms", process, silent_ms);
    }
}

/* ------------------------------------------------------------------ rank 0 */

static bool is_free(const fv_crew_t *crew, uint32_t process)
{
    return atomic_load(&crew->is_spare[process]) && !fv_frame_is_closed(crew->fds[process]);
}

/* A spare, on the host of the lost process if there is one: there may be what that has left. */
static uint32_t pick_spare(const fv_crew_t *crew, const char *host)
{
    uint32_t other = FV_CREW_NOBODY;

    for (uint32_t p = crew->n_ranks; p < crew->n_world; p++) {
        if (!is_free(crew, p)) {
            continue;
        }
        if (strcmp(crew->hellos[p].host, host) == 0) {
            return p;
        }
        other = (other == FV_CREW_NOBODY) ? p : other;
    }
    return other;
}

/* The lost process may be stopped and not dead: on this host that is made sure of. */
static void kill_lost(const fv_ctl_hello_t *lost, const char *own_host)
{
    if ((lost->pid > 1) && (strcmp(lost->host, own_host) == 0)) {
        (void)kill((pid_t)lost->pid, SIGKILL);
    }
}

static void note_loss(fv_crew_t *crew, uint32_t rank, fv_loss_t *out)
{
    uint32_t process = crew->members[rank];

    atomic_store(&crew->rank_of[process], FV_CREW_NOBODY);
    if (crew->heartbeat != NULL) {
        fv_heartbeat_drop(crew->heartbeat, process);
    }
    kill_lost(&crew->hellos[rank], crew->hellos[0].host);
    *out = (fv_loss_t){.rank = rank, .hello = crew->hellos[rank]};
}

static void put_spare(fv_crew_t *crew, uint32_t rank, uint32_t spare)
{
    fv_info("rank %u: spare %u on %s takes its place", rank, spare, crew->hellos[spare].host);
    crew->hellos[rank].pid = crew->hellos[spare].pid; /* the rest comes with its HELLO */
    memcpy(crew->hellos[rank].host, crew->hellos[spare].host, sizeof(crew->hellos[rank].host));
    fv_link_replace(crew->link, rank, crew->fds[spare]);
    atomic_store(&crew->is_spare[spare], false);
    atomic_store(&crew->rank_of[spare], rank);
    crew->members[rank] = spare;
}

/* Puts a spare, or a process that is yet to be started, into the place of each lost rank. */
static fv_status_t replace_lost(fv_crew_t *crew)
{
    bool is_lost[FV_RANKS_MAX] = {false};

    memset(crew->is_recruit, 0, sizeof(crew->is_recruit));
    for (uint32_t r = 1; r < crew->n_ranks; r++) {
        is_lost[r] = fv_link_is_lost(crew->link, r);
    }
    for (uint32_t r = 1; r < crew->n_ranks; r++) {
        if (!is_lost[r]) {
            continue;
        }
        uint32_t spare = pick_spare(crew, crew->hellos[r].host);
        bool is_recruit = (spare == FV_CREW_NOBODY) && fv_recruit_can(crew, is_lost, r);
        if (((spare == FV_CREW_NOBODY) && !is_recruit) || (crew->n_losses == FV_REPAIRED_MAX)) {
            return fv_fail(FV_ERR_RANK_LOST, "rank %u is lost, and no spare is left", r);
        }
        note_loss(crew, r, &crew->losses[crew->n_losses++]);
        if (is_recruit) {
            fv_info("rank %u: no spare waits, a process is started in its place", r);
            fv_link_replace(crew->link, r, -1);
            crew->is_recruit[r] = 1;
        } else {
            put_spare(crew, r, spare);
        }
    }
    return FV_OK;
}

void fv_crew_tell(const fv_crew_t *crew, uint32_t rank, fv_ctl_epoch_t *out)
{
    memset(out, 0, sizeof(*out));
    out->epoch = crew->epoch;
    out->n_ranks = crew->n_ranks;
    out->rank = rank;
    memcpy(out->members, crew->members, crew->n_ranks * sizeof(out->members[0]));
    memcpy(out->is_recruit, crew->is_recruit, crew->n_ranks);
    for (uint32_t i = 0; i < crew->n_losses; i++) {
        const fv_ctl_hello_t *lost = &crew->losses[i].hello;
        if (crew->losses[i].rank == rank) {
            out->is_new = 1;
            out->n_threads = lost->n_threads;
            out->kv_bytes = lost->memory.kv_bytes_total + (uint64_t)lost->move_kib * 1024U;
            out->lost_pid = lost->pid;
            memcpy(out->lost_host, lost->host, sizeof(out->lost_host));
        }
    }
}

static void say_epoch(fv_crew_t *crew, uint32_t rank)
{
    static fv_ctl_epoch_t message; /* large; one thread */

    fv_crew_tell(crew, rank, &message);
    if (fv_link_send(crew->link, rank, FV_CTL_EPOCH, &message, sizeof(message)) != FV_OK) {
        fv_warn("rank %u: %s", rank, fv_error_context()); /* it will be missed below */
    }
}

/* Whoever comes reads its slot's log; those of one host at the same time, it may be from one disk. */
static uint32_t repair_ms(const fv_crew_t *crew)
{
    uint64_t n_bytes = 0;

    for (uint32_t i = 0; i < crew->n_losses; i++) {
        const fv_loss_t *loss = &crew->losses[i];
        bool is_near = strcmp(crew->hellos[loss->rank].host, crew->hellos[0].host) == 0;
        n_bytes += is_near
                       ? fv_main_store_log_bytes(crew->config, crew->job, loss->rank)
                       : fv_main_store_log_most(crew->config, loss->hello.memory.kv_bytes_total);
    }
    return crew->deadline_ms + fv_main_store_log_ms(n_bytes);
}

static fv_status_t enter_epoch(fv_crew_t *crew)
{
    fv_link_begin_epoch(crew->link, crew->epoch);
    for (uint32_t r = 1; r < crew->n_ranks; r++) {
        if (crew->is_recruit[r] == 0U) {
            say_epoch(crew, r);
        }
    }
    fv_deadline_arm(repair_ms(crew), crew->lost_code, "fovead: repair");
    fv_status_t status = fv_crew_make_comm(crew, 0);
    if (status == FV_OK) {
        fv_link_set_comm(crew->link, &crew->comm);
        status = (crew->exchange->ops == NULL)
                     ? FV_OK
                     : fv_main_exchange_renew(&crew->comm, crew->exchange);
    }
    if ((status == FV_OK) && (crew->worker != NULL)) {
        fv_worker_renew(crew->worker);
    }
    for (uint32_t r = 1; (r < crew->n_ranks) && (status == FV_OK); r++) {
        status = fv_link_wait_hello(crew->link, r, &crew->hellos[r]);
    }
    fv_deadline_disarm();
    return status;
}

fv_status_t fv_crew_repair(void *ctx, fv_repaired_t *out)
{
    fv_crew_t *crew = ctx;
    fv_status_t status = FV_ERR_RANK_LOST;

    crew->n_losses = 0;
    while (
        status ==
        FV_ERR_RANK_LOST) { /* again while more are lost, and there is somebody for their places */
        FV_RETURN_IF_ERR(replace_lost(crew));
        crew->epoch++;
        status = enter_epoch(crew);
    }
    FV_RETURN_IF_ERR(status);
    out->n = 0;
    out->epoch = crew->epoch;
    for (uint32_t i = 0; i < crew->n_losses; i++) { /* a rank may have been lost twice */
        uint32_t rank = crew->losses[i].rank;
        bool is_listed = false;
        for (uint32_t k = 0; k < out->n; k++) {
            is_listed = is_listed || (out->ranks[k] == rank);
        }
        if (!is_listed) {
            out->ranks[out->n] = rank;
            out->hellos[out->n++] = crew->hellos[rank];
        }
    }
    return FV_OK;
}

void fv_crew_stop_spares(fv_crew_t *crew)
{
    fv_ctl_header_t header = {.magic = FV_CTL_MAGIC, .type = FV_CTL_STOP, .epoch = crew->epoch};
    fv_frame_piece_t piece = {&header, sizeof(header)};

    for (uint32_t p = crew->n_ranks; (crew->fds != NULL) && (p < crew->n_world); p++) {
        if (is_free(crew, p) && (fv_frame_send(crew->fds[p], &piece, 1, ANSWER_MS) != FV_OK)) {
            fv_warn("spare %u: %s", p, fv_error_context());
        }
    }
}

/* ------------------------------------------------------------------ the others */

fv_status_t fv_crew_adopt(fv_crew_t *crew, const fv_ctl_epoch_t *message)
{
    if ((message->n_ranks == 0U) || (message->n_ranks > crew->n_world) ||
        (message->rank >= message->n_ranks)) {
        return fv_fail(FV_ERR_PROTOCOL, "EPOCH: rank %u of %u, expected at most %u ranks",
                       message->rank, message->n_ranks, crew->n_world);
    }
    for (uint32_t r = 0; r < message->n_ranks; r++) {
        if (message->members[r] >= crew->n_world) {
            return fv_fail(FV_ERR_PROTOCOL, "EPOCH: process %u, expected below %u",
                           message->members[r], crew->n_world);
        }
    }
    crew->epoch = message->epoch;
    crew->n_ranks = message->n_ranks;
    memcpy(crew->members, message->members, message->n_ranks * sizeof(crew->members[0]));
    memcpy(crew->is_recruit, message->is_recruit, message->n_ranks);
    return FV_OK;
}

fv_status_t fv_crew_follow(fv_crew_t *crew, const fv_ctl_epoch_t *message)
{
    FV_RETURN_IF_ERR(fv_crew_adopt(crew, message));
    fv_deadline_arm(crew->deadline_ms, crew->lost_code, "fovead: repair");
    fv_status_t status = fv_crew_make_comm(crew, message->rank);
    if (status == FV_OK) {
        status = fv_main_exchange_renew(&crew->comm, crew->exchange);
    }
    fv_deadline_disarm();
    return status;
}

fv_status_t fv_crew_answer(const fv_crew_t *crew, int fd, const fv_ctl_hello_t *hello)
{
    fv_ctl_header_t header = {.magic = FV_CTL_MAGIC,
                              .type = FV_CTL_HELLO,
                              .epoch = crew->epoch,
                              .body_bytes = sizeof(*hello)};
    fv_frame_piece_t pieces[2] = {{&header, sizeof(header)}, {hello, sizeof(*hello)}};

    return fv_frame_send(fd, pieces, 2, ANSWER_MS);
}

fv_status_t fv_crew_wait_as_spare(int fd, bool *out_is_stop, fv_ctl_epoch_t *out)
{
    fv_ctl_header_t header;

    FV_RETURN_IF_ERR(fv_frame_read(fd, &header, sizeof(header), -1));
    *out_is_stop = header.type == FV_CTL_STOP;
    if ((header.magic != FV_CTL_MAGIC) ||
        (!*out_is_stop && ((header.type != FV_CTL_EPOCH) || (header.body_bytes != sizeof(*out))))) {
        return fv_fail(FV_ERR_PROTOCOL, "a spare was sent message type %u of %u bytes", header.type,
                       header.body_bytes);
    }
    return *out_is_stop ? FV_OK : fv_frame_read(fd, out, sizeof(*out), ANSWER_MS);
}
