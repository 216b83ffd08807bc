/*
 * main_exchange.c - which GPU a rank takes, and how the ranks exchange partial states.
 */
#include "coord/main_exchange.h"

#include "common/log.h"

#include <mpi.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ID_BYTES 16 /* of a GPU */

/* What a rank knows of itself and all must know: whether GPUs may exchange directly. */
typedef struct card {
    int32_t has_worker, is_cuda, has_nccl;
    uint8_t gpu[ID_BYTES];
} card_t;

/* ------------------------------------------------------------------ devices */

/* This worker's number among those of the host. */
static int32_t local_worker(const fv_main_place_t *place)
{
    return place->local_rank - ((place->is_dedicated && place->is_with_coordinator) ? 1 : 0);
}

static int32_t n_local_workers(const fv_main_place_t *place)
{
    return place->n_local_ranks - ((place->is_dedicated && place->is_with_coordinator) ? 1 : 0);
}

int32_t fv_main_device(const fv_main_place_t *place, int32_t n_devices)
{
    return ((n_devices > 0) && (local_worker(place) > 0)) ? (local_worker(place) % n_devices) : 0;
}

int32_t fv_main_device_sharers(const fv_main_place_t *place, int32_t n_devices)
{
    int32_t device = fv_main_device(place, n_devices);
    int32_t n = 0;

    for (int32_t i = 0; (n_devices > 0) && (i < n_local_workers(place)); i++) {
        n += (i % n_devices == device) ? 1 : 0;
    }
    return (n > 0) ? n : 1;
}

/* ------------------------------------------------------------------ agreement */

static card_t
own_card(const fv_main_place_t *place, const fv_backend_ops_t *backend, int32_t device)
{
    card_t card = {.has_worker = (place->rank != 0) || !place->is_dedicated};

#if defined(FV_WITH_CUDA)
    if ((card.has_worker != 0) && (backend == &fv_backend_cuda)) {
        card.is_cuda = fv_backend_cuda_id(device, card.gpu) ? 1 : 0;
    }
#else
    (void)backend;
    (void)device;
#endif
#if defined(FV_WITH_NCCL)
    card.has_nccl = 1;
#endif
    return card;
}

/* NULL: NCCL can connect these ranks; else why it can not. */
static const char *why_not_nccl(const card_t *cards, int n_ranks)
{
    for (int i = 0; i < n_ranks; i++) {
        if (cards[i].has_worker == 0) {
            continue;
        }
        if (cards[i].has_nccl == 0) {
            return "a rank's build has no NCCL";
        }
        if (cards[i].is_cuda == 0) {
            return "not every rank has a GPU";
        }
        for (int j = 0; j < i; j++) {
            if ((cards[j].has_worker != 0) && (memcmp(cards[i].gpu, cards[j].gpu, ID_BYTES) == 0)) {
                return "two ranks share a GPU, and NCCL takes one rank a GPU";
            }
        }
    }
    return NULL;
}

static int n_workers(const card_t *cards, int n_ranks)
{
    int n = 0;

    for (int i = 0; i < n_ranks; i++) {
        n += (cards[i].has_worker != 0) ? 1 : 0;
    }
    return n;
}

/* ------------------------------------------------------------------ opening */

static fv_status_t open_mpi(const fv_main_place_t *place, fv_main_exchange_t *out)
{
    fv_exchange_mpi_t *exchange = NULL;

    FV_RETURN_IF_ERR(fv_exchange_mpi_create(place->comm, &exchange));
    out->ops = &fv_exchange_mpi_ops;
    out->ctx = exchange;
    out->name = "mpi";
    (void)snprintf(out->text, sizeof(out->text), "mpi");
    return FV_OK;
}

#if defined(FV_WITH_NCCL)
static uint32_t first_worker(const fv_main_place_t *place)
{
    return place->is_dedicated ? 1U : 0U;
}

/* The communicator's id from the first worker to all. */
static fv_status_t share_id(const fv_main_place_t *place, uint8_t id[FV_EXCHANGE_NCCL_ID_BYTES])
{
    int root = (int)first_worker(place);
    fv_status_t status = (place->rank == root) ? fv_exchange_nccl_id(id) : FV_OK;
    int is_made = (status == FV_OK) ? 1 : 0;

    if ((MPI_Bcast(&is_made, 1, MPI_INT, root, *(MPI_Comm *)place->comm) != MPI_SUCCESS) ||
        (MPI_Bcast(id, FV_EXCHANGE_NCCL_ID_BYTES, MPI_BYTE, root, *(MPI_Comm *)place->comm) !=
         MPI_SUCCESS)) {
        return fv_fail(FV_ERR_MPI, "exchange: the communicator's id did not reach all ranks");
    }
    FV_RETURN_IF_ERR(status);
    return (is_made != 0) ? FV_OK
                          : fv_fail(FV_ERR_NCCL, "exchange: rank %d made no communicator id", root);
}

static fv_status_t open_nccl(const fv_main_place_t *place,
                             const fv_config_t *config,
                             int32_t device,
                             bool is_collective,
                             fv_main_exchange_t *out)
{
    fv_exchange_nccl_config_t nccl = {
        .rank = (uint32_t)place->rank,
        .n_ranks = (uint32_t)place->n_ranks,
        .first_rank = first_worker(place),
        .device = device,
        .window_bytes = config->exchange_memory,
        .deadline_ms = (uint32_t)config->step_deadline_ms,
        .is_collective = is_collective,
    };
    fv_exchange_nccl_t *exchange = NULL;
    char text[FV_MAIN_EXCHANGE_TEXT - 24] = "";

    out->name = is_collective ? "nccl-collective" : "nccl";
    FV_RETURN_IF_ERR(share_id(place, nccl.id));
    if ((uint32_t)place->rank >= nccl.first_rank) {
        FV_RETURN_IF_ERR(fv_exchange_nccl_create(&nccl, &exchange));
        fv_exchange_nccl_describe(exchange, text, sizeof(text));
        out->ops = &fv_exchange_nccl_ops;
        out->ctx = exchange;
    }
    (void)snprintf(out->text, sizeof(out->text), "%s%s%s%s", out->name,
                   (text[0] != '\0') ? " (" : "", text, (text[0] != '\0') ? ")" : "");
    return FV_OK;
}

/* True when all ranks succeeded. */
static bool all_fine(const fv_main_place_t *place, bool mine)
{
    int local = mine ? 1 : 0;
    int all = 0;

    return (MPI_Allreduce(&local, &all, 1, MPI_INT, MPI_MIN, *(MPI_Comm *)place->comm) ==
            MPI_SUCCESS) &&
           (all != 0);
}

/* NCCL on all ranks or on none. */
static fv_status_t try_nccl(const fv_main_place_t *place,
                            const fv_config_t *config,
                            int32_t device,
                            fv_main_exchange_t *out)
{
    fv_status_t status =
        open_nccl(place, config, device, strcmp(config->exchange, "nccl-collective") == 0, out);

    if (all_fine(place, status == FV_OK)) {
        return FV_OK;
    }
    fv_error_t error = fv_error_capture(status);
    fv_main_exchange_close(out);
    return (status != FV_OK) ? fv_fail(status, "%s", error.text)
                             : fv_fail(FV_ERR_NCCL, "exchange: another rank could not open NCCL");
}
#else
/* Not reached: a rank without NCCL has a reason against it (why_not_nccl). */
static fv_status_t try_nccl(const fv_main_place_t *place,
                            const fv_config_t *config,
                            int32_t device,
                            fv_main_exchange_t *out)
{
    (void)place;
    (void)device;
    (void)out;
    return fv_fail(FV_ERR_UNIMPLEMENTED, "exchange: given %s, but this build has no NCCL",
                   config->exchange);
}
#endif

fv_status_t fv_main_exchange_open(const fv_main_place_t *place,
                                  const fv_config_t *config,
                                  const fv_backend_ops_t *backend,
                                  int32_t device,
                                  fv_main_exchange_t *out)
{
    card_t mine = own_card(place, backend, device);
    bool is_auto = strcmp(config->exchange, "auto") == 0;

    *out = (fv_main_exchange_t){.name = "none", .text = "none"};
    if (place->n_ranks == 1) {
        return FV_OK;
    }
    card_t *cards = calloc((size_t)place->n_ranks, sizeof(*cards));
    bool is_fine = (cards != NULL) &&
                   (MPI_Allgather(&mine, (int)sizeof(mine), MPI_BYTE, cards, (int)sizeof(mine),
                                  MPI_BYTE, *(MPI_Comm *)place->comm) == MPI_SUCCESS);
    const char *why = is_fine ? why_not_nccl(cards, place->n_ranks) : "no agreement of the ranks";
    bool is_alone = is_fine && (n_workers(cards, place->n_ranks) == 1);
    free(cards);
    if (is_alone || (strcmp(config->exchange, "mpi") == 0)) {
        return open_mpi(place, out);
    }
    if (why == NULL) {
        fv_status_t status = try_nccl(place, config, device, out);
        if ((status == FV_OK) || !is_auto) {
            return status;
        }
        fv_warn("exchange over MPI and host memory: NCCL failed: %s", fv_error_context());
    } else if (!is_auto) {
        return fv_fail(FV_ERR_INVALID_ARG, "exchange: given %s, expected auto or mpi: %s",
                       config->exchange, why);
    } else if ((mine.is_cuda != 0) && (place->rank <= 1)) {
        fv_warn("exchange over MPI and host memory: %s", why);
    }
    return open_mpi(place, out);
}

fv_status_t fv_main_exchange_renew(void *comm, fv_main_exchange_t *exchange)
{
    fv_exchange_mpi_t *mpi = NULL;

    if (exchange->ops == &fv_exchange_mpi_ops) {
        return fv_exchange_mpi_renew(exchange->ctx, comm);
    }
    if (exchange->ops != NULL) {
        return fv_fail(FV_ERR_UNIMPLEMENTED, "exchange %s: not renewed in place", exchange->name);
    }
    FV_RETURN_IF_ERR(fv_exchange_mpi_create(comm, &mpi));
    *exchange =
        (fv_main_exchange_t){.ops = &fv_exchange_mpi_ops, .ctx = mpi, .name = "mpi", .text = "mpi"};
    return FV_OK;
}

void fv_main_exchange_close(fv_main_exchange_t *exchange)
{
    if (exchange->ops == &fv_exchange_mpi_ops) {
        fv_exchange_mpi_destroy(exchange->ctx);
    }
#if defined(FV_WITH_NCCL)
    if (exchange->ops == &fv_exchange_nccl_ops) {
        fv_exchange_nccl_destroy(exchange->ctx);
    }
#endif
    exchange->ops = NULL;
    exchange->ctx = NULL;
}
