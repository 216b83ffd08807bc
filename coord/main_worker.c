/*
 * main_worker.c - every rank but 0, spares, recruits: serve in one epoch after another.
 */
#include "coord/main_worker.h"

#include "common/deadline.h"
#include "common/log.h"
#include "coord/main_exit.h"
#include "coord/main_parts.h"
#include "coord/main_ranks.h"
#include "coord/main_recruit.h"
#include "coord/main_repair.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

/* Nobody but this process writes what the lost one has left. */
static void end_lost(const fv_process_t *p, const fv_ctl_epoch_t *message)
{
    if ((message->lost_pid > 1) &&
        (strncmp(message->lost_host, p->hello.host, sizeof(p->hello.host)) == 0)) {
        (void)kill((pid_t)message->lost_pid, SIGKILL); /* it may be stopped, and not dead */
    }
}

/* This process is in the epoch of `message`: its worker, too; and rank 0 is told. */
static fv_status_t settle(fv_process_t *p, const fv_ctl_epoch_t *message)
{
    char host[sizeof(p->hello.host)];

    memcpy(host, p->hello.host, sizeof(host));
    /* it may have been new in an epoch before, which was given up because another rank was lost: then it has what it needs */
    if ((message->is_new != 0U) && (p->worker == NULL)) {
        p->store.place.slot = message->rank; /* what the lost one has left, if this is its host */
        FV_RETURN_IF_ERR(fv_main_start_worker(p, message->kv_bytes, message->n_threads));
    } else {
        fv_worker_renew(p->worker);
        fv_worker_hello(p->worker, &p->hello);
    }
    memcpy(p->hello.host, host, sizeof(host));
    p->hello.pid = (int32_t)getpid();
    fv_info("epoch %u: this is rank %d", message->epoch, p->rank);
    return fv_crew_answer(&p->crew, p->fds[0], &p->hello);
}

/* Into the epoch of `message`; a spare becomes a rank in it. */
static fv_status_t enter_epoch(fv_process_t *p, const fv_ctl_epoch_t *message)
{
    if (message->is_new != 0U) {
        end_lost(p, message);
        p->rank = (int)message->rank;
        fv_log_init(fv_log_level_now, p->rank);
    }
    FV_RETURN_IF_ERR(fv_crew_follow(&p->crew, message));
    return settle(p, message);
}

/* A process that was started for a rank that is lost becomes that. */
static fv_status_t enlist(fv_process_t *p, fv_ctl_epoch_t *epoch)
{
    p->crew.lost_code = FV_EXIT_RANK_LOST;
    fv_deadline_arm((uint32_t)p->config.repair_deadline_ms, FV_EXIT_RANK_LOST, "fovead: joining");
    fv_status_t status = fv_recruit_join(p, epoch);
    p->crew.deadline_ms = (uint32_t)p->config.repair_deadline_ms;
    fv_deadline_disarm(); /* rank 0 knows how long the rest may take: it reads a log, maybe */
    if (status == FV_OK) {
        end_lost(p, epoch);
        status = settle(p, epoch);
    }
    return status;
}

int fv_main_run_worker(fv_process_t *p)
{
    fv_ctl_epoch_t next;
    fv_status_t status = FV_OK;
    bool is_stop = false;

    if (p->is_recruit) {
        status = enlist(p, &next);
    } else if (fv_main_is_spare(p)) {
        fv_log_thread_name("spare");
        status = fv_crew_wait_as_spare(p->fds[0], &is_stop, &next);
        if (is_stop) {
            return FV_EXIT_CLEAN;
        }
        status = (status == FV_OK) ? enter_epoch(p, &next) : status;
    }
    fv_log_thread_name("worker");
    while (status == FV_OK) {
        status = fv_worker_serve(p->worker, p->fds[0], p->crew.epoch, &p->crew.comm, &next);
        if (status != FV_ERR_ABORTED) {
            break;
        }
        status = enter_epoch(p, &next);
    }
    if (status == FV_OK) {
        return FV_EXIT_CLEAN;
    }
    fv_error("exit %d: %s", fv_main_exit_code(status), fv_error_context());
    return fv_main_exit_code(status);
}
