/*
 * moved.h - which pages of an item travel when its KV moves to the queries, and in how many rounds: what coordinator and
 * workers compute alike.
 */
#ifndef FV_PROTO_MOVED_H
#define FV_PROTO_MOVED_H

#include "common/policy.h"
#include "proto/step.h"

/* The KV of one head part that an item's rows read. */
typedef struct fv_moved {
    const fv_policy_t *policy;
    const fv_placement_t *placement;
    int32_t n_parts;    /* A: active context parts */
    int32_t n_heads;    /* KV heads of the head part */
    int32_t head_begin; /* the model's number of the first */
    int32_t group;      /* the model's query heads of a KV head */
    uint64_t n_pages;   /* of a head's whole context, all parts */
    int64_t n_dead;     /* of these, from the first: only those live that the policy keeps */
    size_t page_bytes;
} fv_moved_t;

fv_moved_t fv_moved_make(const fv_model_spec_t *spec,
                         const fv_placement_t *placement,
                         const fv_ctl_item_t *item,
                         int32_t hp);

/* Page `page` of the context is read for local head h, and part d has it. */
bool fv_moved_has(const fv_moved_t *m, int32_t d, int32_t h, int64_t page);

/* Of a local head: pages that some row reads, on all parts. O(1) for dense policies, else O(n_pages). */
uint64_t fv_moved_pages(const fv_moved_t *m, int32_t h);

/* The smallest staging area that serves it: the whole context of the head that has most. */
size_t fv_moved_least_bytes(const fv_moved_t *m);

/* The end of the round that begins with local head h: as many heads as an area of area_bytes holds; at least one. */
int32_t fv_moved_round_end(const fv_moved_t *m, int32_t h, size_t area_bytes);

#endif /* FV_PROTO_MOVED_H */
