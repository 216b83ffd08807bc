/*
 * exchange_regions.h - how a device's window is divided, and which way a message goes. No device is touched here.
 *
 * Decode path: station 8 of 10. Before: worker/partials.c. After: worker/exchange_nccl.c.
 *
 * A rank's window is memory that the other ranks of its NVLink domain (its sources) write into:
 *
 *     flags, one line each source | LL regions | regions
 *
 * LL regions and regions alike: parity 0, one each source, then parity 1, one each source.
 *
 * A pair whose messages of a step are small, and that has one each way, sends them through LL regions: the merge kernel
 * copies them over with the number of the step beside every 4 bytes, and whoever reads waits for the number
 * (kernels.h, fv_merge_pair_t). That saves the release of everything written before, 1.45 us of 4.5 (docs/gpu.md), and
 * the way of the flag after it, but takes twice the bytes. Else:
 *
 * Source a writes its message of a step to b into b's region (parity, a), then sets b's flag a to the number of the step
 * as the pair (a, b) counts them: only steps in which something travels between the two, either way. The parity is that
 * number's lowest bit.
 *
 * Why two regions are enough. When a writes its message number n + 2 over number n, b must have read number n. a has
 * ended its own step n + 1 (steps of a rank follow each other), so it has seen b's flag n + 1, which b sets when all that
 * stands before it on b's stream is done, the merge of n included. Both set flags in each step of the pair, even when one
 * of them has no message for the other. So no rank needs to know that others ended a step; that the coordinator ends
 * each step on all ranks before the next begins is one more reason, not the only one.
 *
 * For LL the same holds: having read b's message number n + 1 is as good as having seen its flag. LL regions hold
 * nothing but LL, so no old data is taken for a number.
 *
 * The region of a rank itself holds its own states, which never travel.
 */
#ifndef FV_WORKER_EXCHANGE_REGIONS_H
#define FV_WORKER_EXCHANGE_REGIONS_H

#include "worker/worker.h"
#include "worker/workspace.h"

#define FV_EXCHANGE_FLAG_BYTES   128U /* a line: neighbours do not disturb each other */
#define FV_EXCHANGE_REGION_ALIGN 4096U

/* Above it the doubled bytes of LL cost more than the release. */
#define FV_EXCHANGE_LL_BYTES ((size_t)64 << 10)

typedef struct fv_exchange_regions {
    uint32_t n_sources;
    size_t region_bytes; /* of one message at most */
    size_t
        ll_bytes; /* of one message that goes by LL at most; its region has twice as many. 0: no LL */
} fv_exchange_regions_t;

/* False when the window is too small to be of use. */
bool fv_exchange_regions_make(size_t window_bytes, uint32_t n_sources, fv_exchange_regions_t *out);

/* Offsets in the window. */
size_t fv_exchange_flag_at(uint32_t source);
size_t
fv_exchange_region_at(const fv_exchange_regions_t *regions, uint32_t parity, uint32_t source);

size_t
fv_exchange_ll_region_at(const fv_exchange_regions_t *regions, uint32_t parity, uint32_t source);

/* How the two messages of a pair travel in a step. */
typedef struct fv_exchange_route {
    bool is_ll; /* both by LL; nothing below holds then but is_paired */
    bool is_send_direct,
        is_recv_direct; /* through a region; else by send and receive, if not empty */
    bool is_paired;     /* the step counts for the pair */
} fv_exchange_route_t;

/* Both ends find the same, the one's send being the other's receive: regions are the same on all ranks. */
fv_exchange_route_t fv_exchange_route(bool is_reached,
                                      const fv_exchange_regions_t *regions,
                                      size_t send_bytes,
                                      size_t recv_bytes);

/* ------------------------------------------------------------------ a rank's messages */

/* What a rank knows of another one. */
typedef struct fv_exchange_known {
    uint8_t *window; /* its window, as this device reaches it; NULL: it does not */
    uint32_t source; /* its place in this rank's window */
    uint32_t seq;    /* steps of the pair so far */
} fv_exchange_known_t;

/* A rank's side of the exchange, and its step under way. Zero-initialise it. */
typedef struct fv_exchange_place {
    fv_exchange_regions_t regions;
    uint8_t *window;            /* own; NULL: everything goes by send and receive */
    uint32_t self_source;       /* this rank's place in every window */
    fv_exchange_known_t *known; /* by rank */
    uint8_t *spill;             /* for what no region takes; the owner makes room for it */

    fv_array_t pairs;      /* fv_merge_pair_t, of the step under way */
    fv_array_t pair_ranks; /* uint32_t: the rank of each */
    size_t n_pairs;
    bool has_rest; /* messages go by send and receive */
} fv_exchange_place_t;

fv_exchange_route_t fv_exchange_route_of(const fv_exchange_place_t *place,
                                         const fv_exchange_peer_t *peer);

/* Bytes of spill that a step needs. */
size_t fv_exchange_spill_bytes(const fv_exchange_place_t *place,
                               const fv_exchange_peer_t *peers,
                               size_t n_peers,
                               size_t own_bytes);

/* begin() of the door, with the spill that is needed. Errors: FV_ERR_NO_MEMORY, nothing has begun then. */
FV_MUST_CHECK fv_status_t fv_exchange_place(fv_exchange_place_t *place,
                                            fv_exchange_peer_t *peers,
                                            size_t n_peers,
                                            size_t own_bytes,
                                            uint8_t **own);

/* Frees the arrays; windows, spill and known are the owner's. */
void fv_exchange_place_free(fv_exchange_place_t *place);

#endif /* FV_WORKER_EXCHANGE_REGIONS_H */
