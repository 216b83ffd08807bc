/*
 * main_worker.c - every rank but 0, and spares: serve in one epoch after another.
 */
#include "coord/main_worker.h"

#include "common/log.h"
#include "coord/main_exit.h"
#include "coord/main_parts.h"
#include "coord/main_ranks.h"
#include "coord/main_repair.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

/* Into the epoch of `message`; a spare becomes a rank in it. */
static fv_status_t enter_epoch(fv_process_t *p, const fv_ctl_epoch_t *message)
{
    char host[sizeof(p->hello.host)];

    memcpy(host, p->hello.host, sizeof(host));
    if (message->is_new != 0U) {
        if ((message->lost_pid > 1) && (strncmp(message->lost_host, host, sizeof(host)) == 0)) {
            (void)kill((pid_t)message->lost_pid, SIGKILL); /* it may be stopped, and not dead */
        }
        p->rank = (int)message->rank;
        fv_log_init(fv_log_level_now, p->rank);
    }
    FV_RETURN_IF_ERR(fv_crew_follow(&p->crew, message));
    if (message->is_new != 0U) {
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

int fv_main_run_worker(fv_process_t *p)
{
    static fv_ctl_epoch_t next; /* large; one thread */
    fv_status_t status = FV_ERR_ABORTED;
    bool is_stop = false;

    if (fv_main_is_spare(p)) {
        fv_log_thread_name("spare");
        status = fv_crew_wait_as_spare(p->fds[0], &is_stop, &next);
        if (is_stop) {
            return FV_EXIT_CLEAN;
        }
        status = (status == FV_OK) ? enter_epoch(p, &next) : status;
    } else {
        status = FV_OK;
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
