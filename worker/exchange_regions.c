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
    size_t flags = flags_bytes(n_sources);

    if ((n_sources == 0U) || (window_bytes <= flags)) {
        return false;
    }
    out->n_sources = n_sources;
    out->region_bytes = (window_bytes - flags) / (2U * (size_t)n_sources) /
                        FV_EXCHANGE_REGION_ALIGN * FV_EXCHANGE_REGION_ALIGN;
    return out->region_bytes > 0U;
}

size_t fv_exchange_flag_at(uint32_t source)
{
    return (size_t)source * FV_EXCHANGE_FLAG_BYTES;
}

size_t fv_exchange_region_at(const fv_exchange_regions_t *regions, uint32_t parity, uint32_t source)
{
    size_t index = (size_t)parity * regions->n_sources + source;

    return flags_bytes(regions->n_sources) + index * regions->region_bytes;
}

fv_exchange_route_t
fv_exchange_route(bool is_reached, size_t region_bytes, size_t send_bytes, size_t recv_bytes)
{
    fv_exchange_route_t route = {
        .is_send_direct = is_reached && (send_bytes > 0U) && (send_bytes <= region_bytes),
        .is_recv_direct = is_reached && (recv_bytes > 0U) && (recv_bytes <= region_bytes),
    };

    route.is_paired = route.is_send_direct || route.is_recv_direct;
    return route;
}
