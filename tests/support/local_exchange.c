/*
 * local_exchange.c - one slot per (sender, receiver) under one lock.
 */
#include "tests/support/local_exchange.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct endpoint {
    fv_local_hub_t *hub;
    uint32_t rank;
} endpoint_t;

struct fv_local_hub {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t n_ranks;
    uint64_t n_messages, n_bytes;
    endpoint_t ends[FV_LOCAL_RANKS_MAX];
    /* what `from` offers to `to`, NULL when taken */
    const fv_exchange_message_t *slots[FV_LOCAL_RANKS_MAX][FV_LOCAL_RANKS_MAX];
};

fv_local_hub_t *fv_local_hub_create(uint32_t n_ranks)
{
    fv_local_hub_t *hub = calloc(1, sizeof(*hub));

    if (hub == NULL) {
        return NULL;
    }
    (void)pthread_mutex_init(&hub->lock, NULL);
    (void)pthread_cond_init(&hub->changed, NULL);
    hub->n_ranks = n_ranks;
    for (uint32_t i = 0; i < n_ranks; i++) {
        hub->ends[i] = (endpoint_t){.hub = hub, .rank = i};
    }
    return hub;
}

void fv_local_hub_destroy(fv_local_hub_t *hub)
{
    if (hub == NULL) {
        return;
    }
    (void)pthread_cond_destroy(&hub->changed);
    (void)pthread_mutex_destroy(&hub->lock);
    free(hub);
}

void *fv_local_hub_ctx(fv_local_hub_t *hub, uint32_t rank)
{
    return &hub->ends[rank];
}

uint64_t fv_local_hub_messages(const fv_local_hub_t *hub)
{
    return hub->n_messages;
}

uint64_t fv_local_hub_bytes(const fv_local_hub_t *hub)
{
    return hub->n_bytes;
}

/* Waits until the slot is (not) NULL. The lock is held. */
static fv_status_t wait_slot(fv_local_hub_t *hub,
                             const fv_exchange_message_t *const *slot,
                             bool filled,
                             const struct timespec *until)
{
    while ((*slot != NULL) != filled) {
        if (pthread_cond_timedwait(&hub->changed, &hub->lock, until) != 0) {
            return fv_fail(FV_ERR_TIMED_OUT, "local exchange: a peer did not answer");
        }
    }
    return FV_OK;
}

static fv_status_t exchange_locked(const endpoint_t *me,
                                   const fv_exchange_message_t *sends,
                                   size_t n_sends,
                                   const fv_exchange_message_t *recvs,
                                   size_t n_recvs,
                                   const struct timespec *until)
{
    fv_local_hub_t *hub = me->hub;

    for (size_t i = 0; i < n_sends; i++) {
        hub->slots[me->rank][sends[i].peer] = &sends[i];
    }
    (void)pthread_cond_broadcast(&hub->changed);
    for (size_t i = 0; i < n_recvs; i++) {
        const fv_exchange_message_t **slot = &hub->slots[recvs[i].peer][me->rank];

        FV_RETURN_IF_ERR(wait_slot(hub, slot, true, until));
        if ((*slot)->n_bytes != recvs[i].n_bytes) {
            return fv_fail(FV_ERR_PROTOCOL, "local exchange: %zu bytes sent, %zu expected",
                           (*slot)->n_bytes, recvs[i].n_bytes);
        }
        memcpy(recvs[i].data, (*slot)->data, recvs[i].n_bytes);
        *slot = NULL;
        hub->n_messages++;
        hub->n_bytes += recvs[i].n_bytes;
        (void)pthread_cond_broadcast(&hub->changed);
    }
    for (size_t i = 0; i < n_sends; i++) {
        FV_RETURN_IF_ERR(wait_slot(hub, &hub->slots[me->rank][sends[i].peer], false, until));
    }
    return FV_OK;
}

static fv_status_t all_to_all(void *ctx,
                              const fv_exchange_message_t *sends,
                              size_t n_sends,
                              const fv_exchange_message_t *recvs,
                              size_t n_recvs,
                              uint32_t deadline_ms)
{
    endpoint_t *me = ctx;
    struct timespec until;

    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += deadline_ms / 1000U;
    until.tv_nsec += (long)(deadline_ms % 1000U) * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    (void)pthread_mutex_lock(&me->hub->lock);
    fv_status_t status = exchange_locked(me, sends, n_sends, recvs, n_recvs, &until);
    (void)pthread_mutex_unlock(&me->hub->lock);
    return status;
}

const fv_exchange_ops_t fv_local_exchange_ops = {.name = "local", .all_to_all = all_to_all};
