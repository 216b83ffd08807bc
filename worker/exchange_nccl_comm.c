/*
 * exchange_nccl_comm.c - the life of the exchange between GPUs: communicator, window, who reaches whom.
 *
 * The communicator is not blocking: every call is polled with a deadline and an eye on the peers, so that a rank that
 * hangs or died ends creation with an error. Whether messages go direct is agreed upon by all ranks (three small
 * all-gathers at start), because both ends of a message must take the same way.
 */
#include "common/clock.h"
#include "common/log.h"
#include "worker/exchange_nccl.h"
#include "worker/exchange_nccl_lsa.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CREATE_MS   60000U /* at least, for creation: NCCL looks at the whole machine */
#define STEP_MS     30000U /* when the configuration does not say */
#define FAREWELL_MS 3000   /* of waiting for an abort */
#define SPIN_US     200
#define NAP_NS      50000
#define WORDS_BYTES 256U

/* ------------------------------------------------------------------ waiting */

fv_status_t fv_nccl_check(ncclResult_t result, const char *call)
{
    if (result == ncclSuccess) {
        return FV_OK;
    }
    const char *why = ncclGetLastError(NULL);
    return fv_fail((result == ncclRemoteError) ? FV_ERR_RANK_LOST : FV_ERR_NCCL, "%s: %s (%.120s)",
                   call, ncclGetErrorString(result), (why == NULL) ? "" : why);
}

static fv_status_t cuda_check(cudaError_t error, const char *call)
{
    if (error == cudaSuccess) {
        return FV_OK;
    }
    return fv_fail((error == cudaErrorMemoryAllocation) ? FV_ERR_NO_MEMORY : FV_ERR_CUDA,
                   "exchange: %.80s: %s", call, cudaGetErrorString(error));
}
#define CUDA(expr) cuda_check((expr), #expr)

/* One look at what a wait may end by. */
static fv_status_t
keep_waiting(const fv_exchange_nccl_t *exchange, int64_t begin_us, const char *what)
{
    int64_t waited_us = fv_clock_us() - begin_us;

    if ((exchange->is_gone != NULL) && exchange->is_gone(exchange->arg)) {
        return fv_fail(FV_ERR_RANK_LOST, "%s: a rank was lost", what);
    }
    uint32_t limit_ms = exchange->config.deadline_ms;
    if (exchange->backend == NULL) { /* creation */
        limit_ms = (limit_ms < CREATE_MS) ? CREATE_MS : limit_ms;
    }
    if (waited_us > (int64_t)limit_ms * 1000) {
        return fv_fail(FV_ERR_TIMED_OUT, "%s: no answer from a rank within %u ms", what, limit_ms);
    }
    if (waited_us > SPIN_US) {
        (void)nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
    return FV_OK;
}

fv_status_t
fv_nccl_settle(const fv_exchange_nccl_t *exchange, ncclResult_t result, const char *call)
{
    int64_t begin_us = fv_clock_us();
    ncclResult_t state = ncclInProgress;

    if (result != ncclInProgress) {
        FV_RETURN_IF_ERR(fv_nccl_check(result, call));
    }
    for (;;) { /* some calls answer "success" and are under way all the same */
        FV_RETURN_IF_ERR(fv_nccl_check(ncclCommGetAsyncError(exchange->comm, &state), call));
        if (state != ncclInProgress) {
            return fv_nccl_check(state, call);
        }
        FV_RETURN_IF_ERR(keep_waiting(exchange, begin_us, call));
    }
}

static fv_status_t settle_stream(const fv_exchange_nccl_t *exchange, const char *what)
{
    int64_t begin_us = fv_clock_us();

    for (;;) {
        cudaError_t error = cudaStreamQuery(exchange->setup_stream);

        if (error != cudaErrorNotReady) {
            return cuda_check(error, what);
        }
        FV_RETURN_IF_ERR(keep_waiting(exchange, begin_us, what));
    }
}

/* ------------------------------------------------------------------ agreement */

/* What a rank says of itself. */
typedef struct card {
    uint64_t window_bytes; /* 0: not direct */
    int32_t first, n;      /* ranks of its NVLink domain */
} card_t;

static uint32_t n_parties(const fv_exchange_nccl_t *exchange)
{
    return exchange->config.n_ranks - exchange->config.first_rank;
}

static fv_status_t
gather_through(const fv_exchange_nccl_t *exchange, const card_t *mine, card_t *all, uint8_t *device)
{
    uint8_t *gathered = device + FV_EXCHANGE_FLAG_BYTES;
    cudaStream_t stream = exchange->setup_stream;

    FV_RETURN_IF_ERR(
        CUDA(cudaMemcpyAsync(device, mine, sizeof(*mine), cudaMemcpyHostToDevice, stream)));
    FV_RETURN_IF_ERR(fv_nccl_settle(
        exchange, ncclAllGather(device, gathered, sizeof(*mine), ncclUint8, exchange->comm, stream),
        "ncclAllGather"));
    FV_RETURN_IF_ERR(CUDA(cudaMemcpyAsync(all, gathered, n_parties(exchange) * sizeof(*all),
                                          cudaMemcpyDeviceToHost, stream)));
    return settle_stream(exchange, "agreement of the ranks");
}

/* Everybody's card to everybody. all [n_parties] */
static fv_status_t gather(const fv_exchange_nccl_t *exchange, const card_t *mine, card_t *all)
{
    uint8_t *device = NULL;

    FV_RETURN_IF_ERR(CUDA(cudaMalloc((void **)&device, FV_EXCHANGE_FLAG_BYTES +
                                                           n_parties(exchange) * sizeof(card_t))));
    fv_status_t status = gather_through(exchange, mine, all, device);
    if (status == FV_OK) { /* else something may still use it */
        (void)cudaFree(device);
    }
    return status;
}

/* The smallest window that any rank offers. */
static fv_status_t
agree_bytes(const fv_exchange_nccl_t *exchange, uint64_t offered, card_t *all, uint64_t *out)
{
    card_t mine = {.window_bytes = offered};

    FV_RETURN_IF_ERR(gather(exchange, &mine, all));
    *out = offered;
    for (uint32_t i = 0; i < n_parties(exchange); i++) {
        *out = (all[i].window_bytes < *out) ? all[i].window_bytes : *out;
    }
    return FV_OK;
}

/* ------------------------------------------------------------------ the window */

/* Device memory that peers can map, flags cleared; without it messages do not go direct. */
static bool alloc_window(fv_exchange_nccl_t *exchange, size_t n_bytes)
{
    void *window = NULL;

    if (ncclMemAlloc(&window, n_bytes) != ncclSuccess) {
        return false;
    }
    exchange->place.window = window;
    exchange->window_bytes = n_bytes;
    return cudaMemsetAsync(window, 0, n_bytes, exchange->setup_stream) == cudaSuccess;
}

static void drop_window(fv_exchange_nccl_t *exchange)
{
    if (exchange->place.window != NULL) {
        (void)ncclMemFree(exchange->place.window);
    }
    exchange->place.window = NULL;
    exchange->window_bytes = 0;
    exchange->place.regions = (fv_exchange_regions_t){0};
}

/* Notes where the windows of the domain's ranks are. bases: as many as ranks. */
static fv_status_t
note_peers(fv_exchange_nccl_t *exchange, const card_t *mine, const card_t *all, void **bases)
{
    const fv_exchange_nccl_config_t *c = &exchange->config;

    FV_RETURN_IF_ERR(
        CUDA(fv_nccl_lsa_bases(exchange->handle, mine->n, bases, exchange->setup_stream)));
    FV_RETURN_IF_ERR(settle_stream(exchange, "windows of the peers"));
    for (int32_t i = 0; i < mine->n; i++) {
        uint32_t party = (uint32_t)(mine->first + i);
        const card_t *its = &all[party];
        fv_exchange_known_t *peer = &exchange->place.known[c->first_rank + party];

        if ((c->first_rank + party == c->rank) || (its->window_bytes == 0U) ||
            (its->first != mine->first) || (its->n != mine->n)) {
            continue;
        }
        peer->window = bases[i];
        peer->source = (uint32_t)i;
        exchange->n_reached++;
    }
    return FV_OK;
}

/* All ranks have memory for it: the peers' windows become reachable where the hardware allows it. */
static fv_status_t open_window(fv_exchange_nccl_t *exchange, card_t *all)
{
    int party = (int)(exchange->config.rank - exchange->config.first_rank);
    card_t mine = {0};
    int first = 0;
    int n = 0;

    FV_RETURN_IF_ERR(fv_nccl_settle(
        exchange,
        ncclCommWindowRegister(exchange->comm, exchange->place.window, exchange->window_bytes,
                               &exchange->handle, NCCL_WIN_COLL_SYMMETRIC),
        "ncclCommWindowRegister"));
    if ((exchange->handle != NULL) &&
        (fv_nccl_lsa_team(exchange->comm, party, &first, &n) == ncclSuccess) && (n > 0) &&
        (first + n <= (int)n_parties(exchange)) &&
        fv_exchange_regions_make(exchange->window_bytes, (uint32_t)n, &exchange->place.regions)) {
        mine = (card_t){.window_bytes = exchange->window_bytes, .first = first, .n = n};
        exchange->place.self_source = (uint32_t)(party - first);
    }
    FV_RETURN_IF_ERR(gather(exchange, &mine, all));
    if (mine.window_bytes == 0U) {
        return FV_OK; /* the window stays: it is registered */
    }
    void **bases = NULL;
    FV_RETURN_IF_ERR(CUDA(cudaHostAlloc((void **)&bases, (size_t)n * sizeof(*bases), 0)));
    fv_status_t status = note_peers(exchange, &mine, all, bases);
    if (status == FV_OK) {
        (void)cudaFreeHost(bases);
    }
    return status;
}

/* Whether and with what window messages go direct. */
static fv_status_t agree_and_open(fv_exchange_nccl_t *exchange, card_t *all)
{
    bool is_able =
        !exchange->config.is_collective && (exchange->version == (int32_t)NCCL_VERSION_CODE);
    uint64_t n_bytes = 0;

    FV_RETURN_IF_ERR(
        agree_bytes(exchange, is_able ? exchange->config.window_bytes : 0U, all, &n_bytes));
    if (n_bytes == 0U) {
        return FV_OK;
    }
    bool has_memory = alloc_window(exchange, (size_t)n_bytes);
    FV_RETURN_IF_ERR(settle_stream(exchange, "clearing the window"));
    FV_RETURN_IF_ERR(agree_bytes(exchange, has_memory ? n_bytes : 0U, all, &n_bytes));
    if (n_bytes == 0U) {
        drop_window(exchange);
        return FV_OK;
    }
    return open_window(exchange, all);
}

/* Connections to ranks that are only reached by send and receive are made now, not in the first step. */
static fv_status_t warm_up(fv_exchange_nccl_t *exchange)
{
    const fv_exchange_nccl_config_t *c = &exchange->config;
    size_t half = FV_EXCHANGE_FLAG_BYTES * (size_t)c->n_ranks;
    ncclResult_t result = ncclSuccess;

    /* what small messages need, so that decode never allocates */
    FV_RETURN_IF_ERR(fv_nccl_reserve_spill(
        exchange, 2U * half + exchange->n_reached * exchange->place.regions.ll_bytes));
    FV_RETURN_IF_ERR(fv_nccl_check(ncclGroupStart(), "ncclGroupStart"));
    for (uint32_t r = c->first_rank; (r < c->n_ranks) && (result == ncclSuccess); r++) {
        uint8_t *at = exchange->place.spill + r * (size_t)FV_EXCHANGE_FLAG_BYTES;
        int party = (int)(r - c->first_rank);

        if ((r == c->rank) || (exchange->place.known[r].window != NULL)) {
            continue;
        }
        result = ncclSend(at, 1, ncclUint8, party, exchange->comm, exchange->setup_stream);
        if (result == ncclSuccess) {
            result =
                ncclRecv(at + half, 1, ncclUint8, party, exchange->comm, exchange->setup_stream);
        }
    }
    ncclResult_t ended = ncclGroupEnd();
    FV_RETURN_IF_ERR(fv_nccl_check(result, "ncclSend, ncclRecv"));
    FV_RETURN_IF_ERR(fv_nccl_settle(exchange, ended, "ncclGroupEnd"));
    return settle_stream(exchange, "first messages");
}

/* ------------------------------------------------------------------ memory */

fv_status_t fv_nccl_reserve_spill(fv_exchange_nccl_t *exchange, size_t n_bytes)
{
    void *spill = NULL;

    if (n_bytes <= exchange->spill_bytes) {
        return FV_OK;
    }
    n_bytes = fv_align_up(n_bytes + n_bytes / 2U, FV_EXCHANGE_REGION_ALIGN);
    if (exchange->place.spill != NULL) {
        if (exchange->backend != NULL) {
            fv_backend_cuda_unreach(exchange->backend, exchange->place.spill);
        }
        (void)cudaFree(exchange->place.spill); /* first: the two need not fit together */
        exchange->place.spill = NULL;
        exchange->spill_bytes = 0;
    }
    FV_RETURN_IF_ERR(CUDA(cudaMalloc(&spill, n_bytes)));
    exchange->place.spill = spill;
    exchange->spill_bytes = n_bytes;
    return (exchange->backend == NULL) ? FV_OK
                                       : fv_backend_cuda_reach(exchange->backend, spill, n_bytes);
}

/* ------------------------------------------------------------------ the end */

/* What the aborting thread works on; freed by whoever comes last. */
typedef struct farewell {
    ncclComm_t comm;
    int device;
    atomic_int n_left; /* of two: the thread, and who waits for it */
    atomic_bool is_done;
} farewell_t;

static void leave(farewell_t *f)
{
    if (atomic_fetch_sub(&f->n_left, 1) == 1) {
        free(f);
    }
}

static void *abort_thread(void *arg)
{
    farewell_t *f = arg;

    (void)cudaSetDevice(f->device);
    (void)ncclCommAbort(f->comm);
    atomic_store(&f->is_done, true);
    leave(f);
    return NULL;
}

void fv_nccl_abort(fv_exchange_nccl_t *exchange)
{
    farewell_t *f = NULL;
    pthread_t thread;

    if (exchange->words != NULL) {
        exchange->words[0] = 1; /* a merge that waits on the device stops waiting */
    }
    if (exchange->comm == NULL) {
        return;
    }
    f = malloc(sizeof(*f));
    if (f == NULL) {
        return; /* the process's end ends it */
    }
    f->comm = exchange->comm;
    f->device = exchange->config.device;
    atomic_init(&f->n_left, 2);
    atomic_init(&f->is_done, false);
    if (pthread_create(&thread, NULL, abort_thread, f) != 0) {
        free(f);
        return;
    }
    (void)pthread_detach(thread);
    exchange->comm = NULL;
    int64_t begin_us = fv_clock_us();
    while (!atomic_load(&f->is_done)) {
        if (fv_clock_us() - begin_us > (int64_t)FAREWELL_MS * 1000) {
            fv_warn("exchange: NCCL did not end within %d ms; its memory stays", FAREWELL_MS);
            exchange->broken = true;
            break;
        }
        (void)nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
    leave(f);
}

void fv_exchange_nccl_destroy(fv_exchange_nccl_t *exchange)
{
    if (exchange == NULL) {
        return;
    }
    /* Between steps nothing is under way, so ending without asking the others is as good as ending together. */
    fv_nccl_abort(exchange);
    fv_exchange_place_free(&exchange->place);
    if (!exchange->broken) { /* else the device may still use it; the process's end frees it */
        drop_window(exchange);
        (void)cudaFree(exchange->place.spill);
        (void)cudaFreeHost((void *)(uintptr_t)exchange->words);
        if (exchange->setup_stream != NULL) {
            (void)cudaStreamDestroy(exchange->setup_stream);
        }
    }
    free(exchange->place.known);
    free(exchange);
}

/* ------------------------------------------------------------------ the beginning */

fv_status_t fv_exchange_nccl_id(uint8_t out[FV_EXCHANGE_NCCL_ID_BYTES])
{
    ncclUniqueId id;

    FV_RETURN_IF_ERR(fv_nccl_check(ncclGetUniqueId(&id), "ncclGetUniqueId"));
    memcpy(out, id.internal, FV_EXCHANGE_NCCL_ID_BYTES);
    return FV_OK;
}

static fv_status_t init(fv_exchange_nccl_t *exchange)
{
    const fv_exchange_nccl_config_t *c = &exchange->config;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    void *words = NULL;
    ncclUniqueId id;
    int version = 0;

    config.blocking = 0;
    memcpy(id.internal, c->id, FV_EXCHANGE_NCCL_ID_BYTES);
    FV_RETURN_IF_ERR(fv_nccl_check(ncclGetVersion(&version), "ncclGetVersion"));
    exchange->version = version;
    FV_RETURN_IF_ERR(CUDA(cudaSetDevice(c->device)));
    FV_RETURN_IF_ERR(
        CUDA(cudaStreamCreateWithFlags(&exchange->setup_stream, cudaStreamNonBlocking)));
    FV_RETURN_IF_ERR(
        CUDA(cudaHostAlloc(&words, WORDS_BYTES, cudaHostAllocMapped | cudaHostAllocPortable)));
    memset(words, 0, WORDS_BYTES);
    exchange->words = words;
    ncclResult_t result = ncclCommInitRankConfig(&exchange->comm, (int)n_parties(exchange), id,
                                                 (int)(c->rank - c->first_rank), &config);
    FV_RETURN_IF_ERR(fv_nccl_settle(exchange, result, "ncclCommInitRankConfig"));
    card_t *all = calloc(n_parties(exchange), sizeof(*all));
    if (all == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "exchange: no host memory");
    }
    fv_status_t status = agree_and_open(exchange, all);
    if (status == FV_OK) {
        free(all); /* else a copy may still be under way to it */
        status = warm_up(exchange);
    }
    return status;
}

fv_status_t fv_exchange_nccl_create(const fv_exchange_nccl_config_t *config,
                                    fv_exchange_nccl_t **out)
{
    if ((config->rank >= config->n_ranks) || (config->rank < config->first_rank)) {
        return fv_fail(FV_ERR_INVALID_ARG, "exchange: rank given %u, expected one of %u..%u",
                       config->rank, config->first_rank, config->n_ranks - 1U);
    }
    fv_exchange_nccl_t *exchange = calloc(1, sizeof(*exchange));
    if (exchange == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "exchange: no host memory");
    }
    exchange->config = *config;
    if (exchange->config.deadline_ms == 0U) {
        exchange->config.deadline_ms = STEP_MS;
    }
    if (exchange->config.window_bytes == 0U) {
        exchange->config.window_bytes = FV_EXCHANGE_NCCL_WINDOW_BYTES;
    }
    exchange->config.window_bytes =
        exchange->config.window_bytes / FV_EXCHANGE_REGION_ALIGN * FV_EXCHANGE_REGION_ALIGN;
    exchange->place.known = calloc(config->n_ranks, sizeof(*exchange->place.known));
    fv_status_t status = (exchange->place.known != NULL)
                             ? init(exchange)
                             : fv_fail(FV_ERR_NO_MEMORY, "exchange: no host memory");
    if (status != FV_OK) {
        fv_error_t error = fv_error_capture(status);

        exchange->broken = true;
        fv_exchange_nccl_destroy(exchange);
        return fv_fail(status, "%s", error.text);
    }
    *out = exchange;
    return FV_OK;
}

void fv_exchange_nccl_describe(const fv_exchange_nccl_t *exchange, char *out, size_t out_bytes)
{
    (void)snprintf(out, out_bytes, "NCCL %d.%d.%d, window %zu MiB, %u of %u other ranks direct",
                   exchange->version / 10000, exchange->version / 100 % 100,
                   exchange->version % 100, exchange->window_bytes >> 20U, exchange->n_reached,
                   n_parties(exchange) - 1U);
}
