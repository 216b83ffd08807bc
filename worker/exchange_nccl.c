/*
 * exchange_nccl.c - the packed all-to-all of a step between GPUs.
 *
 * Decode path: station 8 of 10. Before: worker/partials.c. After: kernels (merge).
 *
 * Direct (exchange_regions.h): small messages are copied over by the merge kernel itself; large ones the decode kernel
 * writes straight into the window of the rank that merges them, so that the exchange is done when the attention is, and
 * the merge kernel signals and waits. Nothing is launched for either.
 * The rest: NCCL's grouped send and receive between pieces of ordinary device memory, on the same stream.
 * A step whose peer does not come ends by a deadline, on the device and on the host; afterwards nothing works any more.
 */
#include "worker/exchange_nccl.h"

enum {
    WORD_ABORT = 0,
    WORD_GAVE_UP = 1
};

static fv_status_t
nccl_begin(void *ctx, fv_exchange_peer_t *peers, size_t n_peers, size_t own_bytes, uint8_t **own)
{
    fv_exchange_nccl_t *exchange = ctx;
    fv_exchange_place_t *place = &exchange->place;

    if (exchange->broken) {
        return fv_fail(FV_ERR_RANK_LOST, "exchange: it failed in an earlier step");
    }
    exchange->words[WORD_GAVE_UP] = 0;
    FV_RETURN_IF_ERR(
        fv_nccl_reserve_spill(exchange, fv_exchange_spill_bytes(place, peers, n_peers, own_bytes)));
    return fv_exchange_place(place, peers, n_peers, own_bytes, own);
}

/* ------------------------------------------------------------------ run */

/* Both messages of a peer that no region takes. */
static fv_status_t post(const fv_exchange_nccl_t *exchange, const fv_exchange_peer_t *peer)
{
    fv_exchange_route_t route = fv_exchange_route_of(&exchange->place, peer);
    int rank = (int)(peer->rank - exchange->config.first_rank);

    if (route.is_ll) {
        return FV_OK;
    }
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

    if (exchange->place.has_rest) {
        FV_RETURN_IF_ERR(post_all(exchange, peers, n_peers));
    }
    exchange->sync = (fv_merge_sync_t){
        .pairs = exchange->place.pairs.data,
        .n_pairs = exchange->place.n_pairs,
        .deadline_ms = exchange->config.deadline_ms,
        .abort = &exchange->words[WORD_ABORT],
        .gave_up = &exchange->words[WORD_GAVE_UP],
    };
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
                       ((const uint32_t *)exchange->place.pair_ranks.data)[gave_up - 1U],
                       exchange->config.deadline_ms);
    }
    if (!exchange->place.has_rest) {
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
    const fv_exchange_place_t *place = &exchange->place;

    exchange->backend = backend;
    exchange->stream = fv_backend_cuda_stream(backend);
    for (uint32_t r = 0; r < exchange->config.n_ranks; r++) {
        if (place->known[r].window != NULL) {
            FV_RETURN_IF_ERR(
                fv_backend_cuda_reach(backend, place->known[r].window, exchange->window_bytes));
        }
    }
    if (place->window != NULL) {
        FV_RETURN_IF_ERR(fv_backend_cuda_reach(backend, place->window, exchange->window_bytes));
    }
    if (place->spill != NULL) {
        FV_RETURN_IF_ERR(fv_backend_cuda_reach(backend, place->spill, exchange->spill_bytes));
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
    return exchange->place.has_rest &&
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
