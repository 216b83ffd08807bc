/*
 * exchange_nccl.c - the packed all-to-all of a step between GPUs.
 *
 * Decode path: station 8 of 10. Before: worker/partials.c. After: kernels (merge).
 *
 * Direct (exchange_regions.h): the decode kernel writes states straight into the window of the rank that merges them, so
 * the exchange is done when the attention is; the merge kernel signals and waits. Nothing is launched for it.
 * The rest: NCCL's grouped send and receive between pieces of ordinary device memory, on the same stream.
 * A step whose peer does not come ends by a deadline, on the device and on the host; afterwards nothing works any more.
 */
#include "worker/exchange_nccl.h"

#define SPILL_ALIGN 512U

enum {
    WORD_ABORT = 0,
    WORD_GAVE_UP = 1
};

/* ------------------------------------------------------------------ begin */

static fv_exchange_route_t route_of(const fv_exchange_nccl_t *exchange,
                                    const fv_exchange_peer_t *peer)
{
    return fv_exchange_route(exchange->peers[peer->rank].window != NULL,
                             exchange->regions.region_bytes, peer->send_bytes, peer->recv_bytes);
}

/* The next piece of the spill; *at moves past it. A pass without memory only counts. */
static uint8_t *take_spill(const fv_exchange_nccl_t *exchange, size_t n_bytes, size_t *at)
{
    uint8_t *piece = (exchange->spill == NULL) ? NULL : (exchange->spill + *at);

    *at += fv_align_up(n_bytes, SPILL_ALIGN);
    return piece;
}

static bool is_own_in_window(const fv_exchange_nccl_t *exchange, size_t own_bytes)
{
    return (exchange->window != NULL) && (own_bytes <= exchange->regions.region_bytes);
}

static fv_status_t reserve(fv_exchange_nccl_t *exchange,
                           const fv_exchange_peer_t *peers,
                           size_t n_peers,
                           size_t own_bytes)
{
    size_t n_bytes = 0;

    for (size_t i = 0; i < n_peers; i++) {
        fv_exchange_route_t route = route_of(exchange, &peers[i]);

        n_bytes += route.is_send_direct ? 0U : fv_align_up(peers[i].send_bytes, SPILL_ALIGN);
        n_bytes += route.is_recv_direct ? 0U : fv_align_up(peers[i].recv_bytes, SPILL_ALIGN);
    }
    n_bytes += is_own_in_window(exchange, own_bytes) ? 0U : fv_align_up(own_bytes, SPILL_ALIGN);
    FV_RETURN_IF_ERR(fv_array_reserve(&exchange->pairs, n_peers, sizeof(fv_merge_pair_t)));
    FV_RETURN_IF_ERR(fv_array_reserve(&exchange->pair_ranks, n_peers, sizeof(uint32_t)));
    return fv_nccl_reserve_spill(exchange, n_bytes);
}

/* Where the messages of one peer lie. */
static void place(fv_exchange_nccl_t *exchange, fv_exchange_peer_t *peer, size_t *spill_at)
{
    const fv_exchange_regions_t *regions = &exchange->regions;
    fv_nccl_peer_t *known = &exchange->peers[peer->rank];
    fv_exchange_route_t route = route_of(exchange, peer);

    if (route.is_paired) {
        fv_merge_pair_t *pair = (fv_merge_pair_t *)exchange->pairs.data + exchange->sync.n_pairs;

        known->seq++;
        *pair = (fv_merge_pair_t){
            .signal =
                (uint32_t *)(void *)(known->window + fv_exchange_flag_at(exchange->self_source)),
            .awaited =
                (const uint32_t *)(void *)(exchange->window + fv_exchange_flag_at(known->source)),
            .value = known->seq,
        };
        ((uint32_t *)exchange->pair_ranks.data)[exchange->sync.n_pairs++] = peer->rank;
    }
    uint32_t parity = known->seq & 1U;
    peer->send =
        route.is_send_direct
            ? (known->window + fv_exchange_region_at(regions, parity, exchange->self_source))
            : take_spill(exchange, peer->send_bytes, spill_at);
    peer->recv = route.is_recv_direct
                     ? (exchange->window + fv_exchange_region_at(regions, parity, known->source))
                     : take_spill(exchange, peer->recv_bytes, spill_at);
    exchange->has_collective = exchange->has_collective ||
                               (!route.is_send_direct && (peer->send_bytes > 0U)) ||
                               (!route.is_recv_direct && (peer->recv_bytes > 0U));
}

static fv_status_t
nccl_begin(void *ctx, fv_exchange_peer_t *peers, size_t n_peers, size_t own_bytes, uint8_t **own)
{
    fv_exchange_nccl_t *exchange = ctx;
    size_t spill_at = 0;

    if (exchange->broken) {
        return fv_fail(FV_ERR_RANK_LOST, "exchange: it failed in an earlier step");
    }
    FV_RETURN_IF_ERR(reserve(exchange, peers, n_peers, own_bytes));
    exchange->sync.pairs = exchange->pairs.data;
    exchange->sync.n_pairs = 0;
    exchange->has_collective = false;
    exchange->words[WORD_GAVE_UP] = 0;
    for (size_t i = 0; i < n_peers; i++) {
        place(exchange, &peers[i], &spill_at);
    }
    *own = is_own_in_window(exchange, own_bytes)
               ? (exchange->window +
                  fv_exchange_region_at(&exchange->regions, 0, exchange->self_source))
               : take_spill(exchange, own_bytes, &spill_at);
    return FV_OK;
}

/* ------------------------------------------------------------------ run */

/* Both messages of a peer that no region takes. */
static fv_status_t post(const fv_exchange_nccl_t *exchange, const fv_exchange_peer_t *peer)
{
    fv_exchange_route_t route = route_of(exchange, peer);
    int rank = (int)(peer->rank - exchange->config.first_rank);

    if (!route.is_send_direct && (peer->send_bytes > 0U)) {
        FV_RETURN_IF_ERR(fv_nccl_check(ncclSend(peer->send, peer->send_bytes, ncclUint8, rank,
                                                exchange->comm, exchange->stream),
                                       "ncclSend"));
    }
    if (!route.is_recv_direct && (peer->recv_bytes > 0U)) {
        FV_RETURN_IF_ERR(fv_nccl_check(ncclRecv(peer->recv, peer->recv_bytes, ncclUint8, rank,
                                                exchange->comm, exchange->stream),
                                       "ncclRecv"));
    }
    return FV_OK;
}

static fv_status_t
post_all(const fv_exchange_nccl_t *exchange, const fv_exchange_peer_t *peers, size_t n_peers)
{
    fv_status_t status = FV_OK;

    FV_RETURN_IF_ERR(fv_nccl_check(ncclGroupStart(), "ncclGroupStart"));
    for (size_t i = 0; (i < n_peers) && (status == FV_OK); i++) {
        status = post(exchange, &peers[i]);
    }
    ncclResult_t result = ncclGroupEnd(); /* also after an error: the group is the thread's */
    FV_RETURN_IF_ERR(status);
    return fv_nccl_settle(exchange, result, "ncclGroupEnd");
}

static fv_status_t nccl_run(void *ctx,
                            const fv_exchange_peer_t *peers,
                            size_t n_peers,
                            const fv_merge_sync_t **out_sync)
{
    fv_exchange_nccl_t *exchange = ctx;

    if (exchange->has_collective) {
        FV_RETURN_IF_ERR(post_all(exchange, peers, n_peers));
    }
    exchange->sync.deadline_ms = exchange->config.deadline_ms;
    exchange->sync.abort = &exchange->words[WORD_ABORT];
    exchange->sync.gave_up = &exchange->words[WORD_GAVE_UP];
    *out_sync = &exchange->sync;
    return FV_OK;
}

/* ------------------------------------------------------------------ end */

/* What the device and the library say of a step that the backend has finished. */
static fv_status_t verdict(const fv_exchange_nccl_t *exchange)
{
    uint32_t gave_up = exchange->words[WORD_GAVE_UP];
    ncclResult_t result = ncclSuccess;

    if (gave_up != 0U) {
        return fv_fail(FV_ERR_TIMED_OUT, "exchange: nothing from rank %u within %u ms",
                       ((const uint32_t *)exchange->pair_ranks.data)[gave_up - 1U],
                       exchange->config.deadline_ms);
    }
    if (!exchange->has_collective) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(
        fv_nccl_check(ncclCommGetAsyncError(exchange->comm, &result), "ncclCommGetAsyncError"));
    return fv_nccl_check(result, "a message between ranks");
}

static fv_status_t nccl_end(void *ctx, fv_status_t status)
{
    fv_exchange_nccl_t *exchange = ctx;

    if (status == FV_OK) {
        status = verdict(exchange);
    }
    if (status == FV_OK) {
        return FV_OK;
    }
    fv_error_t error = fv_error_capture(status);
    exchange->broken = true;
    fv_nccl_abort(exchange);
    return fv_fail(status, "%s", error.text);
}

/* ------------------------------------------------------------------ the rest of the door */

static fv_status_t nccl_attach(void *ctx, fv_backend_t *backend)
{
    fv_exchange_nccl_t *exchange = ctx;

    exchange->backend = backend;
    exchange->stream = fv_backend_cuda_stream(backend);
    for (uint32_t r = 0; r < exchange->config.n_ranks; r++) {
        if (exchange->peers[r].window != NULL) {
            FV_RETURN_IF_ERR(
                fv_backend_cuda_reach(backend, exchange->peers[r].window, exchange->window_bytes));
        }
    }
    if (exchange->window != NULL) {
        FV_RETURN_IF_ERR(fv_backend_cuda_reach(backend, exchange->window, exchange->window_bytes));
    }
    if (exchange->spill != NULL) {
        FV_RETURN_IF_ERR(fv_backend_cuda_reach(backend, exchange->spill, exchange->spill_bytes));
    }
    return FV_OK;
}

/* While the backend is waited for: is the peer gone, or the communicator broken? */
static bool nccl_is_aborted(void *ctx)
{
    const fv_exchange_nccl_t *exchange = ctx;
    ncclResult_t result = ncclSuccess;

    if ((exchange->is_gone != NULL) && exchange->is_gone(exchange->arg)) {
        return true;
    }
    return exchange->has_collective &&
           ((ncclCommGetAsyncError(exchange->comm, &result) != ncclSuccess) ||
            ((result != ncclSuccess) && (result != ncclInProgress)));
}

static void nccl_on_poll(void *ctx, bool (*is_gone)(void *arg), void *arg)
{
    fv_exchange_nccl_t *exchange = ctx;

    exchange->is_gone = is_gone;
    exchange->arg = arg;
}

const fv_exchange_ops_t fv_exchange_nccl_ops = {
    .name = "nccl",
    .attach = nccl_attach,
    .begin = nccl_begin,
    .run = nccl_run,
    .end = nccl_end,
    .is_aborted = nccl_is_aborted,
    .on_poll = nccl_on_poll,
};
