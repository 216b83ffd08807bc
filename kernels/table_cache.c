/*
 * table_cache.c - a hash of tables, a list by last use, and buddy blocks.
 */
#include "kernels/table_cache.h"

#include <stdlib.h>
#include <string.h>

#define NONE       UINT32_MAX
#define LEVELS_MAX 32U
#define LEVEL_USED 0x80U /* beside the level of a block's first unit */
#define LEVEL_NONE 0x7fU /* inside a block */

/* A table; stands at the index of its block's first unit, so that there is one for every possible block. */
typedef struct entry {
    uint64_t id, version, step;
    uint32_t n_heads, stride, n_known;
    uint32_t next_in_bucket;
    uint32_t newer, older; /* by last use; of a free block: next and previous of its level */
} entry_t;

struct fv_table_cache {
    uint32_t n_units;   /* of FV_TABLE_BLOCK_WORDS */
    uint32_t n_buckets; /* power of two */
    uint32_t newest, oldest, n_entries;
    uint64_t step;
    uint32_t free_blocks[LEVELS_MAX];
    entry_t *entries;  /* [n_units] */
    uint32_t *buckets; /* [n_buckets] */
    uint8_t *levels;   /* [n_units] */
};

/* ------------------------------------------------------------------ blocks */

static void push_free(fv_table_cache_t *c, uint32_t unit, uint32_t level)
{
    c->levels[unit] = (uint8_t)level;
    c->entries[unit].older = NONE;
    c->entries[unit].newer = c->free_blocks[level];
    if (c->free_blocks[level] != NONE) {
        c->entries[c->free_blocks[level]].older = unit;
    }
    c->free_blocks[level] = unit;
}

static void drop_free(fv_table_cache_t *c, uint32_t unit)
{
    const entry_t *e = &c->entries[unit];

    if (e->older != NONE) {
        c->entries[e->older].newer = e->newer;
    } else {
        c->free_blocks[c->levels[unit]] = e->newer;
    }
    if (e->newer != NONE) {
        c->entries[e->newer].older = e->older;
    }
}

/* A block of 2^level units, or NONE. */
static uint32_t take_block(fv_table_cache_t *c, uint32_t level)
{
    uint32_t from = level;
    uint32_t unit = NONE;

    while ((from < LEVELS_MAX) && (c->free_blocks[from] == NONE)) {
        from++;
    }
    if (from == LEVELS_MAX) {
        return NONE;
    }
    unit = c->free_blocks[from];
    drop_free(c, unit);
    while (from > level) {
        from--;
        push_free(c, unit + ((uint32_t)1 << from), from);
    }
    c->levels[unit] = (uint8_t)(LEVEL_USED | level);
    return unit;
}

static void give_block(fv_table_cache_t *c, uint32_t unit)
{
    uint32_t level = c->levels[unit] & ~LEVEL_USED;

    for (;;) {
        const uint32_t buddy = unit ^ ((uint32_t)1 << level);

        c->levels[unit] = LEVEL_NONE;
        if ((buddy >= c->n_units) || (c->levels[buddy] != level)) {
            break;
        }
        drop_free(c, buddy);
        c->levels[buddy] = LEVEL_NONE;
        unit = (unit < buddy) ? unit : buddy;
        level++;
    }
    push_free(c, unit, level);
}

/* ------------------------------------------------------------------ tables */

static uint32_t *bucket_of(const fv_table_cache_t *c, uint64_t id)
{
    const uint64_t mixed =
        id * 0x9e3779b97f4a7c15U; /* 2^64 / golden ratio: Knuth's multiplicative hash */

    return &c->buckets[(mixed >> 32U) & (c->n_buckets - 1U)];
}

static uint32_t find(const fv_table_cache_t *c, uint64_t id)
{
    uint32_t at = *bucket_of(c, id);

    while ((at != NONE) && (c->entries[at].id != id)) {
        at = c->entries[at].next_in_bucket;
    }
    return at;
}

static void unlink_use(fv_table_cache_t *c, uint32_t at)
{
    const entry_t *e = &c->entries[at];

    *((e->newer != NONE) ? &c->entries[e->newer].older : &c->newest) = e->older;
    *((e->older != NONE) ? &c->entries[e->older].newer : &c->oldest) = e->newer;
}

static void link_newest(fv_table_cache_t *c, uint32_t at)
{
    c->entries[at].newer = NONE;
    c->entries[at].older = c->newest;
    *((c->newest != NONE) ? &c->entries[c->newest].newer : &c->oldest) = at;
    c->newest = at;
}

static void forget(fv_table_cache_t *c, uint32_t at)
{
    uint32_t *link = bucket_of(c, c->entries[at].id);

    while (*link != at) {
        link = &c->entries[*link].next_in_bucket;
    }
    *link = c->entries[at].next_in_bucket;
    unlink_use(c, at);
    c->n_entries--;
    give_block(c, at);
}

/* A block for n_heads x stride words; what was used longest ago makes room. NONE: the rest is of this step. */
static uint32_t make_room(fv_table_cache_t *c, uint32_t n_heads, uint32_t stride)
{
    const uint64_t n_words = (uint64_t)n_heads * stride;
    uint32_t level = 0;
    uint32_t unit = NONE;

    while (((uint64_t)FV_TABLE_BLOCK_WORDS << level) < n_words) {
        level++;
    }
    if (level >= LEVELS_MAX) {
        return NONE;
    }
    unit = take_block(c, level);
    while ((unit == NONE) && (c->oldest != NONE) && (c->entries[c->oldest].step != c->step)) {
        forget(c, c->oldest);
        unit = take_block(c, level);
    }
    return unit;
}

static uint32_t add(fv_table_cache_t *c, uint64_t id, uint32_t n_heads, uint32_t n)
{
    uint32_t stride = 4; /* rows are multiples of 16 bytes */
    uint32_t at = 0;

    if (n > (uint32_t)INT32_MAX) {
        return NONE;
    }
    while (stride < n) {
        stride *= 2U;
    }
    at = make_room(c, n_heads, stride);
    if (at == NONE) {
        return NONE;
    }
    uint32_t *bucket = bucket_of(c, id);
    c->entries[at] =
        (entry_t){.id = id, .n_heads = n_heads, .stride = stride, .next_in_bucket = *bucket};
    *bucket = at;
    link_newest(c, at);
    c->n_entries++;
    return at;
}

bool fv_table_cache_use(fv_table_cache_t *cache,
                        uint64_t id,
                        uint64_t version,
                        uint32_t n_heads,
                        uint32_t n,
                        fv_table_view_t *out)
{
    uint32_t at = find(cache, id);
    entry_t *e = NULL;

    if ((at != NONE) &&
        ((cache->entries[at].n_heads != n_heads) || (cache->entries[at].stride < n))) {
        if (cache->entries[at].step == cache->step) {
            return false; /* the step reads it as it is */
        }
        forget(cache, at); /* it has outgrown its block */
        at = NONE;
    }
    if (at == NONE) {
        at = add(cache, id, n_heads, n);
        if (at == NONE) {
            return false;
        }
    }
    e = &cache->entries[at];
    if ((e->step == cache->step) && (e->version != version)) {
        return false;
    }
    *out = (fv_table_view_t){.offset = at * FV_TABLE_BLOCK_WORDS,
                             .stride = e->stride,
                             .n_known = (e->version == version) ? e->n_known : 0U};
    out->n_known = (out->n_known < n) ? out->n_known : n;
    if ((e->version != version) || (e->n_known < n)) {
        e->n_known = n;
    }
    e->version = version;
    e->step = cache->step;
    unlink_use(cache, at);
    link_newest(cache, at);
    return true;
}

void fv_table_cache_begin(fv_table_cache_t *cache)
{
    cache->step++;
}

void fv_table_cache_undo(fv_table_cache_t *cache)
{
    while ((cache->newest != NONE) && (cache->entries[cache->newest].step == cache->step)) {
        forget(cache, cache->newest);
    }
}

uint32_t fv_table_cache_count(const fv_table_cache_t *cache)
{
    return cache->n_entries;
}

/* ------------------------------------------------------------------ life */

/* The area as free blocks, the largest first: each begins at a multiple of its own size. */
static void free_all(fv_table_cache_t *c)
{
    uint32_t at = 0;

    memset(c->levels, LEVEL_NONE, c->n_units);
    for (uint32_t level = LEVELS_MAX; level-- > 0U;) {
        if (((uint64_t)1 << level) <= c->n_units - at) {
            push_free(c, at, level);
            at += (uint32_t)1 << level;
        }
    }
}

fv_status_t fv_table_cache_create(size_t n_words, fv_table_cache_t **out)
{
    const size_t n_units = n_words / FV_TABLE_BLOCK_WORDS;
    fv_table_cache_t *c = calloc(1, sizeof(*c));

    if ((c == NULL) || (n_units == 0U) || (n_words > UINT32_MAX)) {
        free(c);
        return fv_fail((c == NULL) ? FV_ERR_NO_MEMORY : FV_ERR_INVALID_ARG,
                       "page tables: given %zu words, expected %u..%u", n_words,
                       FV_TABLE_BLOCK_WORDS, UINT32_MAX);
    }
    c->n_units = (uint32_t)n_units;
    c->n_buckets = 1;
    while (c->n_buckets < n_units / 4U) { /* tables are rarely as small as a unit */
        c->n_buckets *= 2U;
    }
    c->newest = NONE;
    c->oldest = NONE;
    c->entries = calloc(n_units, sizeof(*c->entries));
    c->levels = malloc(n_units);
    c->buckets = malloc(c->n_buckets * sizeof(*c->buckets));
    if ((c->entries == NULL) || (c->levels == NULL) || (c->buckets == NULL)) {
        fv_table_cache_destroy(c);
        return fv_fail(FV_ERR_NO_MEMORY, "page tables: no host memory for %zu blocks", n_units);
    }
    memset(c->buckets, 0xff, c->n_buckets * sizeof(*c->buckets));
    memset(c->free_blocks, 0xff, sizeof(c->free_blocks));
    free_all(c);
    *out = c;
    return FV_OK;
}

void fv_table_cache_destroy(fv_table_cache_t *cache)
{
    if (cache == NULL) {
        return;
    }
    free(cache->entries);
    free(cache->levels);
    free(cache->buckets);
    free(cache);
}
