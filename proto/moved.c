/*
 * moved.c - see moved.h.
 */
#include "proto/moved.h"

fv_moved_t fv_moved_make(const fv_model_spec_t *spec,
                         const fv_placement_t *placement,
                         const fv_ctl_item_t *item,
                         int32_t hp)
{
    fv_head_part_t part = fv_placement_head_part(placement, spec, hp);
    fv_moved_t m = {
        .policy = &spec->policies[spec->layer_policy[item->layer]],
        .placement = placement,
        .n_parts = fv_placement_active_parts(placement, item->kv_end),
        .n_heads = fv_placement_n_heads(placement, spec, hp),
        .head_begin = part.head_begin,
        .group = fv_model_group(spec),
        .n_pages = fv_div_up(fv_item_sees_end(item), FV_PAGE_TOKENS),
        .page_bytes = fv_model_page_bytes(spec),
    };

    m.n_dead = fv_policy_dead_pages(m.policy, (int64_t)item->position);
    m.n_dead = (m.n_dead < (int64_t)m.n_pages) ? m.n_dead : (int64_t)m.n_pages;
    return m;
}

static bool is_read(const fv_moved_t *m, int32_t h, int64_t page)
{
    return (page >= m->n_dead) || fv_policy_keeps(m->policy, m->head_begin + h, m->group, page);
}

bool fv_moved_has(const fv_moved_t *m, int32_t d, int32_t h, int64_t page)
{
    return (fv_placement_part_of(m->placement, (uint64_t)page * FV_PAGE_TOKENS) == d) &&
           is_read(m, h, page);
}

uint64_t fv_moved_pages(const fv_moved_t *m, int32_t h)
{
    uint64_t n = m->n_pages - (uint64_t)m->n_dead;

    for (int64_t page = 0; page < m->n_dead; page++) {
        n += is_read(m, h, page) ? 1U : 0U;
    }
    return n;
}

size_t fv_moved_least_bytes(const fv_moved_t *m)
{
    uint64_t most = 0;

    for (int32_t h = 0; h < m->n_heads; h++) {
        uint64_t n = fv_moved_pages(m, h);

        most = (n > most) ? n : most;
    }
    return (size_t)most * m->page_bytes;
}

int32_t fv_moved_round_end(const fv_moved_t *m, int32_t h, size_t area_bytes)
{
    uint64_t room = area_bytes / m->page_bytes;
    uint64_t n = fv_moved_pages(m, h++);

    while (h < m->n_heads) {
        n += fv_moved_pages(m, h);
        if (n > room) {
            break;
        }
        h++;
    }
    return h;
}
