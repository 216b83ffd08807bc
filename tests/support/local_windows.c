/*
 * local_windows.c - windows in ordinary memory, flags as C atomics.
 */
#include "tests/support/local_windows.h"

#include "worker/exchange_regions.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DEADLINE_S 20

typedef struct rank_side {
    fv_exchange_place_t place;
    void *hub_ctx;
    uint8_t *window;
    size_t spill_bytes;
    uint64_t n_direct, n_ll, n_rest;
    fv_exchange_message_t messages[2 * FV_LOCAL_RANKS_MAX];
} rank_side_t;

struct fv_local_windows {
    uint32_t n_ranks;
    rank_side_t sides[FV_LOCAL_RANKS_MAX];
};

fv_local_windows_t *fv_local_windows_create(fv_local_hub_t *hub,
                                            uint32_t n_ranks,
                                            uint32_t domain_ranks,
                                            size_t window_bytes)
{
    fv_local_windows_t *w = calloc(1, sizeof(*w));
    bool is_ok = w != NULL;

    for (uint32_t r = 0; is_ok && (r < n_ranks); r++) {
        rank_side_t *side = &w->sides[r];

        side->hub_ctx = fv_local_hub_ctx(hub, r);
        side->window = aligned_alloc(4096, window_bytes);
        side->place.known = calloc(n_ranks, sizeof(*side->place.known));
        is_ok = (side->window != NULL) && (side->place.known != NULL);
        if (is_ok) {
            memset(side->window, 0, window_bytes);
            side->place.window = side->window;
        }
        w->n_ranks = r + 1U;
    }
    for (uint32_t r = 0; is_ok && (r < n_ranks); r++) {
        fv_exchange_place_t *place = &w->sides[r].place;
        uint32_t first = r / domain_ranks * domain_ranks;
        uint32_t end = (first + domain_ranks < n_ranks) ? (first + domain_ranks) : n_ranks;

        is_ok = fv_exchange_regions_make(window_bytes, end - first, &place->regions);
        place->self_source = r - first;
        for (uint32_t p = first; p < end; p++) {
            place->known[p].window = (p == r) ? NULL : w->sides[p].window;
            place->known[p].source = p - first;
        }
    }
    if (!is_ok) {
        fv_local_windows_destroy(w);
        return NULL;
    }
    return w;
}

void fv_local_windows_destroy(fv_local_windows_t *w)
{
    for (uint32_t r = 0; (w != NULL) && (r < w->n_ranks); r++) {
        fv_exchange_place_free(&w->sides[r].place);
        free(w->sides[r].place.known);
        free(w->sides[r].place.spill);
        free(w->sides[r].window);
    }
    free(w);
}

void *fv_local_windows_ctx(fv_local_windows_t *windows, uint32_t rank)
{
    return &windows->sides[rank];
}

uint64_t fv_local_windows_direct(const fv_local_windows_t *windows)
{
    uint64_t n = 0;

    for (uint32_t r = 0; r < windows->n_ranks; r++) {
        n += windows->sides[r].n_direct;
    }
    return n;
}

uint64_t fv_local_windows_ll(const fv_local_windows_t *windows)
{
    uint64_t n = 0;

    for (uint32_t r = 0; r < windows->n_ranks; r++) {
        n += windows->sides[r].n_ll;
    }
    return n;
}

uint64_t fv_local_windows_rest(const fv_local_windows_t *windows)
{
    uint64_t n = 0;

    for (uint32_t r = 0; r < windows->n_ranks; r++) {
        n += windows->sides[r].n_rest;
    }
    return n;
}

static fv_status_t attach(void *ctx, fv_backend_t *backend)
{
    (void)ctx;
    return (backend != NULL) ? FV_OK : fv_fail(FV_ERR_INTERNAL, "attached to nothing");
}

static fv_status_t
begin(void *ctx, fv_exchange_peer_t *peers, size_t n_peers, size_t own_bytes, uint8_t **own)
{
    rank_side_t *side = ctx;
    size_t n_bytes = fv_exchange_spill_bytes(&side->place, peers, n_peers, own_bytes);

    if (n_bytes > side->spill_bytes) {
        free(side->place.spill);
        side->place.spill = aligned_alloc(512, n_bytes);
        side->spill_bytes = (side->place.spill != NULL) ? n_bytes : 0U;
        if (side->place.spill == NULL) {
            return fv_fail(FV_ERR_NO_MEMORY, "local windows: %zu bytes", n_bytes);
        }
    }
    if (side->place.spill != NULL) {
        memset(side->place.spill, 0xff, side->spill_bytes); /* what nobody writes is NaN */
    }
    return fv_exchange_place(&side->place, peers, n_peers, own_bytes, own);
}

/* LL: a word and its proof are one store. */
static void send_ll(const fv_merge_pair_t *pair)
{
    _Atomic uint64_t *to = (_Atomic uint64_t *)(void *)pair->ll_send;

    for (size_t i = 0; i < pair->send_bytes / sizeof(uint32_t); i++) {
        atomic_store_explicit(&to[i], ((uint64_t)pair->value << 32U) | pair->send[i],
                              memory_order_release);
    }
}

/* A merge on the CPU reads plain states where the message begins: its words close up, once all are there. */
static fv_status_t receive_ll(const fv_merge_pair_t *pair, time_t begin_s)
{
    _Atomic uint64_t *from = (_Atomic uint64_t *)(void *)(uintptr_t)pair->ll_recv;
    uint32_t *plain = (uint32_t *)(void *)(uintptr_t)pair->ll_recv;
    size_t n = pair->recv_bytes / sizeof(uint32_t);

    for (size_t i = 0; i < n; i++) {
        while ((atomic_load_explicit(&from[i], memory_order_acquire) >> 32U) != pair->value) {
            if (time(NULL) - begin_s > DEADLINE_S) {
                return fv_fail(FV_ERR_TIMED_OUT, "local windows: a word never came");
            }
            (void)sched_yield();
        }
    }
    for (size_t i = 0; i < n; i++) {
        plain[i] = (uint32_t)atomic_load_explicit(&from[i], memory_order_relaxed);
    }
    return FV_OK;
}

/* What the merge kernel does: tell each peer, then wait for each. */
static fv_status_t meet(const fv_exchange_place_t *place)
{
    const fv_merge_pair_t *pairs = place->pairs.data;
    time_t begin_s = time(NULL);

    for (size_t i = 0; i < place->n_pairs; i++) {
        if (pairs[i].ll_send != NULL) {
            send_ll(&pairs[i]);
            continue;
        }
        atomic_store_explicit((_Atomic uint32_t *)(void *)pairs[i].signal, pairs[i].value,
                              memory_order_release);
    }
    for (size_t i = 0; i < place->n_pairs; i++) {
        _Atomic uint32_t *flag = (_Atomic uint32_t *)(void *)(uintptr_t)pairs[i].awaited;

        if (pairs[i].ll_send != NULL) {
            FV_RETURN_IF_ERR(receive_ll(&pairs[i], begin_s));
            continue;
        }
        while ((int32_t)(atomic_load_explicit(flag, memory_order_acquire) - pairs[i].value) < 0) {
            if (time(NULL) - begin_s > DEADLINE_S) {
                return fv_fail(FV_ERR_TIMED_OUT, "local windows: no signal");
            }
            (void)sched_yield();
        }
    }
    return FV_OK;
}

static fv_status_t
run(void *ctx, const fv_exchange_peer_t *peers, size_t n_peers, const fv_merge_sync_t **out_sync)
{
    rank_side_t *side = ctx;
    fv_exchange_message_t *sends = side->messages;
    fv_exchange_message_t *recvs = side->messages + FV_LOCAL_RANKS_MAX;
    size_t n_sends = 0;
    size_t n_recvs = 0;

    for (size_t i = 0; i < n_peers; i++) {
        const fv_exchange_peer_t *p = &peers[i];
        fv_exchange_route_t route = fv_exchange_route_of(&side->place, p);

        side->n_direct += route.is_send_direct ? 1U : 0U;
        if (route.is_ll) {
            side->n_ll++;
            continue;
        }
        if (!route.is_send_direct && (p->send_bytes > 0U)) {
            sends[n_sends++] = (fv_exchange_message_t){p->rank, p->send, p->send_bytes};
            side->n_rest++;
        }
        if (!route.is_recv_direct && (p->recv_bytes > 0U)) {
            recvs[n_recvs++] = (fv_exchange_message_t){p->rank, p->recv, p->recv_bytes};
        }
    }
    *out_sync = NULL;
    if (n_sends + n_recvs > 0U) {
        FV_RETURN_IF_ERR(fv_local_exchange_ops.all_to_all(side->hub_ctx, sends, n_sends, recvs,
                                                          n_recvs, DEADLINE_S * 1000U));
    }
    return meet(&side->place);
}

static fv_status_t end(void *ctx, fv_status_t status)
{
    (void)ctx;
    return status;
}

/* The devices here are the host, whose work is done when it is told. */
static fv_status_t bring(void *ctx,
                         const fv_exchange_message_t *sends,
                         size_t n_sends,
                         const fv_exchange_message_t *recvs,
                         size_t n_recvs)
{
    rank_side_t *side = ctx;

    return fv_local_exchange_ops.all_to_all(side->hub_ctx, sends, n_sends, recvs, n_recvs,
                                            DEADLINE_S * 1000U);
}

const fv_exchange_ops_t fv_local_windows_ops =
    {.name = "windows", .attach = attach, .begin = begin, .run = run, .bring = bring, .end = end};
