/*
 * exchange_regions.c - how a device's window is divided, and which way a message goes.
 */
#include "worker/exchange_regions.h"

/* Flags of all sources, to a multiple of a region's alignment. */
static size_t flags_bytes(uint32_t n_sources)
{
    size_t n_bytes = (size_t)n_sources * FV_EXCHANGE_FLAG_BYTES;

    return (n_bytes + FV_EXCHANGE_REGION_ALIGN - 1U) / FV_EXCHANGE_REGION_ALIGN *
           FV_EXCHANGE_REGION_ALIGN;
}

bool fv_exchange_regions_make(size_t window_bytes, uint32_t n_sources, fv_exchange_regions_t *out)
{
    size_t n_regions = 2U * (size_t)n_sources;
    size_t used = flags_bytes(n_sources);

    if ((n_sources == 0U) || (window_bytes <= used)) {
        return false;
    }
    *out = (fv_exchange_regions_t){.n_sources = n_sources};
    if (window_bytes - used >= 4U * n_regions * 2U * FV_EXCHANGE_LL_BYTES) { /* a quarter at most */
        out->ll_bytes = FV_EXCHANGE_LL_BYTES;
        used += n_regions * 2U * FV_EXCHANGE_LL_BYTES;
    }
    out->region_bytes =
        (window_bytes - used) / n_regions / FV_EXCHANGE_REGION_ALIGN * FV_EXCHANGE_REGION_ALIGN;
    return out->region_bytes > 0U;
}

size_t fv_exchange_flag_at(uint32_t source)
{
    return (size_t)source * FV_EXCHANGE_FLAG_BYTES;
}

size_t
fv_exchange_ll_region_at(const fv_exchange_regions_t *regions, uint32_t parity, uint32_t source)
{
    size_t index = (size_t)parity * regions->n_sources + source;

    return flags_bytes(regions->n_sources) + index * 2U * regions->ll_bytes;
}

size_t fv_exchange_region_at(const fv_exchange_regions_t *regions, uint32_t parity, uint32_t source)
{
    size_t index = (size_t)parity * regions->n_sources + source;

    return fv_exchange_ll_region_at(regions, 2, 0) + index * regions->region_bytes;
}

fv_exchange_route_t fv_exchange_route(bool is_reached,
                                      const fv_exchange_regions_t *regions,
                                      size_t send_bytes,
                                      size_t recv_bytes)
{
    fv_exchange_route_t route = {.is_ll = is_reached && (send_bytes > 0U) &&
                                          (send_bytes <= regions->ll_bytes) && (recv_bytes > 0U) &&
                                          (recv_bytes <= regions->ll_bytes)};

    if (!route.is_ll && is_reached) {
        route.is_send_direct = (send_bytes > 0U) && (send_bytes <= regions->region_bytes);
        route.is_recv_direct = (recv_bytes > 0U) && (recv_bytes <= regions->region_bytes);
    }
    route.is_paired = route.is_ll || route.is_send_direct || route.is_recv_direct;
    return route;
}

/* ------------------------------------------------------------------ a rank's messages */

#define SPILL_ALIGN 512U

fv_exchange_route_t fv_exchange_route_of(const fv_exchange_place_t *place,
                                         const fv_exchange_peer_t *peer)
{
    return fv_exchange_route(place->known[peer->rank].window != NULL, &place->regions,
                             peer->send_bytes, peer->recv_bytes);
}

static bool is_own_in_window(const fv_exchange_place_t *place, size_t own_bytes)
{
    return (place->window != NULL) && (own_bytes <= place->regions.region_bytes);
}

size_t fv_exchange_spill_bytes(const fv_exchange_place_t *place,
                               const fv_exchange_peer_t *peers,
                               size_t n_peers,
                               size_t own_bytes)
{
    size_t n_bytes = is_own_in_window(place, own_bytes) ? 0U : fv_align_up(own_bytes, SPILL_ALIGN);

    for (size_t i = 0; i < n_peers; i++) {
        fv_exchange_route_t route = fv_exchange_route_of(place, &peers[i]);

        n_bytes += route.is_send_direct ? 0U : fv_align_up(peers[i].send_bytes, SPILL_ALIGN);
        n_bytes += (route.is_recv_direct || route.is_ll)
                       ? 0U
                       : fv_align_up(peers[i].recv_bytes, SPILL_ALIGN);
    }
    return n_bytes;
}

/* The next piece of the spill, which moves past it; NULL when it is empty. */
static uint8_t *take(uint8_t **spill, size_t n_bytes)
{
    uint8_t *piece = *spill;

    if (n_bytes == 0U) {
        return NULL;
    }
    *spill += fv_align_up(n_bytes, SPILL_ALIGN);
    return piece;
}

/* The step counts for the pair. 0 is no number: it means "plain" beside a word, and memory begins with it. */
static fv_merge_pair_t *add_pair(fv_exchange_place_t *place, uint32_t rank)
{
    fv_merge_pair_t *pair = (fv_merge_pair_t *)place->pairs.data + place->n_pairs;
    fv_exchange_known_t *known = &place->known[rank];

    known->seq = (known->seq == UINT32_MAX) ? 2U : (known->seq + 1U); /* odd, even, odd */
    *pair = (fv_merge_pair_t){.value = known->seq};
    ((uint32_t *)place->pair_ranks.data)[place->n_pairs++] = rank;
    return pair;
}

/* Small messages both ways: this rank's waits in the spill, the peer's is named where it arrives. */
static void place_ll(fv_exchange_place_t *place, fv_exchange_peer_t *peer, uint8_t **spill)
{
    fv_merge_pair_t *pair = add_pair(place, peer->rank);
    const fv_exchange_known_t *known = &place->known[peer->rank];
    uint32_t parity = pair->value & 1U;

    peer->send = take(spill, peer->send_bytes);
    peer->recv = place->window + fv_exchange_ll_region_at(&place->regions, parity, known->source);
    pair->send = (const uint32_t *)(void *)peer->send;
    pair->ll_send =
        (uint32_t *)(void *)(known->window +
                             fv_exchange_ll_region_at(&place->regions, parity, place->self_source));
    pair->ll_recv = (const uint32_t *)(void *)peer->recv;
    pair->send_bytes = peer->send_bytes;
    pair->recv_bytes = peer->recv_bytes;
}

static void place_peer(fv_exchange_place_t *place, fv_exchange_peer_t *peer, uint8_t **spill)
{
    const fv_exchange_known_t *known = &place->known[peer->rank];
    fv_exchange_route_t route = fv_exchange_route_of(place, peer);

    if (route.is_ll) {
        place_ll(place, peer, spill);
        return;
    }
    if (route.is_paired) {
        fv_merge_pair_t *pair = add_pair(place, peer->rank);

        pair->signal =
            (uint32_t *)(void *)(known->window + fv_exchange_flag_at(place->self_source));
        pair->awaited =
            (const uint32_t *)(void *)(place->window + fv_exchange_flag_at(known->source));
    }
    uint32_t parity = known->seq & 1U;
    peer->send =
        route.is_send_direct
            ? (known->window + fv_exchange_region_at(&place->regions, parity, place->self_source))
            : take(spill, peer->send_bytes);
    peer->recv =
        route.is_recv_direct
            ? (place->window + fv_exchange_region_at(&place->regions, parity, known->source))
            : take(spill, peer->recv_bytes);
    place->has_rest = place->has_rest || (!route.is_send_direct && (peer->send_bytes > 0U)) ||
                      (!route.is_recv_direct && (peer->recv_bytes > 0U));
}

fv_status_t fv_exchange_place(fv_exchange_place_t *place,
                              fv_exchange_peer_t *peers,
                              size_t n_peers,
                              size_t own_bytes,
                              uint8_t **own)
{
    uint8_t *spill = place->spill;

    FV_RETURN_IF_ERR(fv_array_reserve(&place->pairs, n_peers, sizeof(fv_merge_pair_t)));
    FV_RETURN_IF_ERR(fv_array_reserve(&place->pair_ranks, n_peers, sizeof(uint32_t)));
    place->n_pairs = 0;
    place->has_rest = false;
    for (size_t i = 0; i < n_peers; i++) {
        place_peer(place, &peers[i], &spill);
    }
    *own = is_own_in_window(place, own_bytes)
               ? (place->window + fv_exchange_region_at(&place->regions, 0, place->self_source))
               : take(&spill, own_bytes);
    return FV_OK;
}

void fv_exchange_place_free(fv_exchange_place_t *place)
{
    fv_array_free(&place->pairs);
    fv_array_free(&place->pair_ranks);
}
