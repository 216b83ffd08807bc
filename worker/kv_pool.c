/*
 * kv_pool.c - slabs, pages and their reference counts.
 *
 * One 32-bit word per possible page: its reference count while held, else PAGE_FREE and the index of the
 * slab's next free page. Pages of a fresh slab are not linked one by one: the first n_fresh have been
 * handed out once, in an order that differs from slab to slab, so that the pages of one head do not
 * lie at one exact stride (memory channels would be hit unevenly).
 */
#include "worker/kv_pool.h"

#include <stdlib.h>

#define NONE      UINT32_MAX
#define PAGE_FREE 0x80000000U /* the word of a free page: this bit and the next free index */
#define LIST_END  0x7fffffffU /* no next free page */

typedef struct slab {
    uint32_t prev, next; /* partly used slabs of the class; next alone: free slabs */
    uint32_t page_class;
    uint32_t n_used;
    uint32_t n_fresh;    /* pages ever handed out since the slab joined its class */
    uint32_t free_head;  /* pages handed out and returned */
    uint32_t step, base; /* fresh page i is page (base + i * step) % pages_per_slab */
} slab_t;

typedef struct page_class {
    size_t page_bytes;
    uint32_t pages_per_slab;
    uint32_t partial; /* first slab with a free page, or NONE */
    uint32_t n_free;  /* free pages in the partly used slabs */
    uint32_t n_slabs;
} page_class_t;

struct fv_kv_pool {
    size_t slab_bytes;
    uint32_t n_slabs, n_slabs_free;
    uint32_t free_slabs; /* head of the list, or NONE */
    uint32_t n_slabs_seen;
    uint32_t words_per_slab;
    uint32_t n_classes;
    page_class_t classes[FV_KV_POOL_CLASSES_MAX];
    uint64_t n_pages_held;
    slab_t *slabs;   /* [n_slabs] */
    uint32_t *words; /* [n_slabs * words_per_slab] */
};

static size_t default_slab_bytes(size_t arena_bytes)
{
    size_t bytes = FV_KV_SLAB_BYTES;

    while ((bytes > FV_KV_SLAB_BYTES_MIN) && (arena_bytes / bytes < 4U)) {
        bytes /= 2U;
    }
    return bytes;
}

fv_status_t fv_kv_pool_create(size_t arena_bytes, size_t slab_bytes, fv_kv_pool_t **out)
{
    if (slab_bytes == 0U) {
        slab_bytes = default_slab_bytes(arena_bytes);
    }
    if ((slab_bytes < FV_KV_SLAB_BYTES_MIN) || ((slab_bytes & (slab_bytes - 1U)) != 0U) ||
        (slab_bytes > ((size_t)1 << 30))) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "KV slab size: given %zu bytes, expected a power of two in %u..%u",
                       slab_bytes, FV_KV_SLAB_BYTES_MIN, 1U << 30);
    }
    if ((arena_bytes < slab_bytes) || (arena_bytes / FV_PAGE_UNIT >= FV_PAGE_NONE)) {
        return fv_fail(FV_ERR_INVALID_ARG, "KV memory: given %zu bytes, expected %zu..%llu",
                       arena_bytes, slab_bytes,
                       (unsigned long long)FV_PAGE_NONE * FV_PAGE_UNIT - 1U);
    }
    fv_kv_pool_t *pool = calloc(1, sizeof(*pool));
    if (pool == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "KV pool: no host memory");
    }
    pool->slab_bytes = slab_bytes;
    pool->n_slabs = (uint32_t)(arena_bytes / slab_bytes);
    pool->words_per_slab = (uint32_t)(slab_bytes / FV_KV_PAGE_BYTES_MIN);
    pool->slabs = calloc(pool->n_slabs, sizeof(*pool->slabs));
    pool->words = calloc((size_t)pool->n_slabs * pool->words_per_slab, sizeof(*pool->words));
    if ((pool->slabs == NULL) || (pool->words == NULL)) {
        fv_kv_pool_destroy(pool);
        return fv_fail(FV_ERR_NO_MEMORY, "KV pool: no host memory for the tables of %zu bytes",
                       arena_bytes);
    }
    pool->n_slabs_free = pool->n_slabs;
    for (uint32_t i = 0; i < pool->n_slabs; i++) {
        pool->slabs[i].next = (i + 1U < pool->n_slabs) ? (i + 1U) : NONE;
        pool->slabs[i].page_class = NONE;
    }
    *out = pool;
    return FV_OK;
}

void fv_kv_pool_destroy(fv_kv_pool_t *pool)
{
    if (pool == NULL) {
        return;
    }
    free(pool->slabs);
    free(pool->words);
    free(pool);
}

fv_status_t fv_kv_pool_class(fv_kv_pool_t *pool, size_t page_bytes, uint32_t *out_class)
{
    for (uint32_t i = 0; i < pool->n_classes; i++) {
        if (pool->classes[i].page_bytes == page_bytes) {
            *out_class = i;
            return FV_OK;
        }
    }
    if ((page_bytes < FV_KV_PAGE_BYTES_MIN) || (page_bytes > FV_KV_PAGE_BYTES_MAX) ||
        (page_bytes % FV_PAGE_UNIT != 0U)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "KV page size: given %zu bytes, expected a multiple of %u in %u..%u",
                       page_bytes, FV_PAGE_UNIT, FV_KV_PAGE_BYTES_MIN, FV_KV_PAGE_BYTES_MAX);
    }
    if (page_bytes > pool->slab_bytes) {
        return fv_fail(
            FV_ERR_INVALID_ARG,
            "KV page size: given %zu bytes, expected at most the slab size of this arena, %zu",
            page_bytes, pool->slab_bytes);
    }
    if (pool->n_classes == FV_KV_POOL_CLASSES_MAX) {
        return fv_fail(FV_ERR_EXHAUSTED, "KV page sizes: %u are in use, expected at most %u",
                       pool->n_classes, FV_KV_POOL_CLASSES_MAX);
    }
    pool->classes[pool->n_classes] =
        (page_class_t){.page_bytes = page_bytes,
                       .pages_per_slab = (uint32_t)(pool->slab_bytes / page_bytes),
                       .partial = NONE};
    *out_class = pool->n_classes++;
    return FV_OK;
}

/* ------------------------------------------------------------------ slabs */

static void link_partial(fv_kv_pool_t *pool, uint32_t s)
{
    page_class_t *c = &pool->classes[pool->slabs[s].page_class];

    pool->slabs[s].prev = NONE;
    pool->slabs[s].next = c->partial;
    if (c->partial != NONE) {
        pool->slabs[c->partial].prev = s;
    }
    c->partial = s;
}

static void unlink_partial(fv_kv_pool_t *pool, uint32_t s)
{
    slab_t *slab = &pool->slabs[s];

    if (slab->prev != NONE) {
        pool->slabs[slab->prev].next = slab->next;
    } else {
        pool->classes[slab->page_class].partial = slab->next;
    }
    if (slab->next != NONE) {
        pool->slabs[slab->next].prev = slab->prev;
    }
}

static uint32_t gcd(uint32_t a, uint32_t b)
{
    while (b != 0U) {
        uint32_t rest = a % b;

        a = b;
        b = rest;
    }
    return a;
}

/* Takes a free slab into a class; its pages come in an order of its own. */
static void open_slab(fv_kv_pool_t *pool, uint32_t page_class)
{
    page_class_t *c = &pool->classes[page_class];
    uint32_t s = pool->free_slabs;
    slab_t *slab = &pool->slabs[s];
    uint32_t mixed = s * 2654435761U; /* Knuth's multiplicative hash */

    pool->free_slabs = slab->next;
    pool->n_slabs_free--;
    pool->n_slabs_seen = (s < pool->n_slabs_seen) ? pool->n_slabs_seen : (s + 1U);
    slab->page_class = page_class;
    slab->n_used = 0;
    slab->n_fresh = 0;
    slab->free_head = LIST_END;
    slab->base = (mixed >> 8) % c->pages_per_slab;
    slab->step = 1U + ((mixed >> 20) % c->pages_per_slab);
    while (gcd(slab->step, c->pages_per_slab) !=
           1U) { /* at most the largest gap between coprimes */
        slab->step++;
    }
    c->n_slabs++;
    c->n_free += c->pages_per_slab;
    link_partial(pool, s);
}

static void close_slab(fv_kv_pool_t *pool, uint32_t s)
{
    slab_t *slab = &pool->slabs[s];
    page_class_t *c = &pool->classes[slab->page_class];

    unlink_partial(pool, s);
    c->n_free -= c->pages_per_slab;
    c->n_slabs--;
    slab->page_class = NONE;
    slab->next = pool->free_slabs;
    pool->free_slabs = s;
    pool->n_slabs_free++;
}

/* ------------------------------------------------------------------ pages */

bool fv_kv_pool_has(const fv_kv_pool_t *pool, uint32_t page_class, uint64_t n)
{
    const page_class_t *c = &pool->classes[page_class];

    return n <= c->n_free + (uint64_t)pool->n_slabs_free * c->pages_per_slab;
}

fv_page_ref_t fv_kv_pool_take(fv_kv_pool_t *pool, uint32_t page_class)
{
    page_class_t *c = &pool->classes[page_class];

    if (c->partial == NONE) {
        if (pool->n_slabs_free == 0U) {
            return FV_PAGE_NONE;
        }
        open_slab(pool, page_class);
    }
    uint32_t s = c->partial;
    slab_t *slab = &pool->slabs[s];
    uint32_t *words = &pool->words[(size_t)s * pool->words_per_slab];
    uint32_t i = slab->free_head;
    if (i != LIST_END) {
        slab->free_head = words[i] & ~PAGE_FREE;
    } else {
        i = (uint32_t)((slab->base + (uint64_t)slab->n_fresh * slab->step) % c->pages_per_slab);
        slab->n_fresh++;
    }
    words[i] = 1;
    slab->n_used++;
    c->n_free--;
    pool->n_pages_held++;
    if (slab->n_used == c->pages_per_slab) {
        unlink_partial(pool, s);
    }
    return (fv_page_ref_t)(((size_t)s * pool->slab_bytes + (size_t)i * c->page_bytes) /
                           FV_PAGE_UNIT);
}

fv_status_t fv_kv_pool_alloc(fv_kv_pool_t *pool, uint32_t page_class, size_t n, fv_page_ref_t *out)
{
    if (!fv_kv_pool_has(pool, page_class, n)) {
        return fv_fail(FV_ERR_EXHAUSTED, "KV memory: %llu bytes needed, %llu free",
                       (unsigned long long)n * pool->classes[page_class].page_bytes,
                       (unsigned long long)fv_kv_pool_bytes_free(pool));
    }
    for (size_t i = 0; i < n; i++) {
        out[i] = fv_kv_pool_take(pool, page_class);
    }
    return FV_OK;
}

/* The word of a held page, and its slab. */
static uint32_t *held_word(const fv_kv_pool_t *pool, fv_page_ref_t page, uint32_t *out_slab)
{
    size_t offset = (size_t)page * FV_PAGE_UNIT;
    size_t s = offset / pool->slab_bytes;

    FV_ASSERT((s < pool->n_slabs) && (pool->slabs[s].page_class != NONE));
    size_t page_bytes = pool->classes[pool->slabs[s].page_class].page_bytes;
    size_t in_slab = offset % pool->slab_bytes;
    FV_ASSERT(in_slab % page_bytes == 0U);
    uint32_t *word = &pool->words[s * pool->words_per_slab + in_slab / page_bytes];
    FV_ASSERT((*word != 0U) && ((*word & PAGE_FREE) == 0U));
    *out_slab = (uint32_t)s;
    return word;
}

void fv_kv_pool_ref(fv_kv_pool_t *pool, fv_page_ref_t page)
{
    uint32_t s = 0;

    if (pool == NULL) {
        return;
    }
    uint32_t *word = held_word(pool, page, &s);

    FV_ASSERT(*word < PAGE_FREE - 1U);
    (*word)++;
}

void fv_kv_pool_unref(fv_kv_pool_t *pool, fv_page_ref_t page)
{
    uint32_t s = 0;

    if (pool == NULL) {
        return;
    }
    uint32_t *word = held_word(pool, page, &s);
    slab_t *slab = &pool->slabs[s];
    page_class_t *c = &pool->classes[slab->page_class];

    if (*word > 1U) {
        (*word)--;
        return;
    }
    *word = PAGE_FREE | slab->free_head;
    slab->free_head = (uint32_t)(word - &pool->words[(size_t)s * pool->words_per_slab]);
    if (slab->n_used == c->pages_per_slab) {
        link_partial(pool, s);
    }
    slab->n_used--;
    c->n_free++;
    pool->n_pages_held--;
    if (slab->n_used == 0U) {
        close_slab(pool, s);
    }
}

uint32_t fv_kv_pool_refs(const fv_kv_pool_t *pool, fv_page_ref_t page)
{
    size_t offset = (size_t)page * FV_PAGE_UNIT;
    size_t s = offset / pool->slab_bytes;

    if ((s >= pool->n_slabs) || (pool->slabs[s].page_class == NONE)) {
        return 0;
    }
    size_t page_bytes = pool->classes[pool->slabs[s].page_class].page_bytes;
    uint32_t word =
        pool->words[s * pool->words_per_slab + (offset % pool->slab_bytes) / page_bytes];
    return ((word & PAGE_FREE) != 0U) ? 0U : word;
}

/* ------------------------------------------------------------------ from tables */

fv_status_t fv_kv_pool_check(const fv_kv_pool_t *pool, uint32_t page_class, fv_page_ref_t page)
{
    const page_class_t *c = &pool->classes[page_class];
    size_t offset = (size_t)page * FV_PAGE_UNIT;
    size_t s = offset / pool->slab_bytes;
    size_t in_slab = offset % pool->slab_bytes;

    if ((page == FV_PAGE_NONE) || (s >= pool->n_slabs) || (in_slab % c->page_bytes != 0U) ||
        (in_slab / c->page_bytes >= c->pages_per_slab) ||
        ((pool->slabs[s].page_class != NONE) && (pool->slabs[s].page_class != page_class)) ||
        (pool->words[s * pool->words_per_slab + in_slab / c->page_bytes] >= PAGE_FREE - 1U)) {
        return fv_fail(FV_ERR_DATA_LOSS,
                       "page %u: expected one of %zu bytes in an arena of %u slabs", page,
                       c->page_bytes, pool->n_slabs);
    }
    return FV_OK;
}

void fv_kv_pool_adopt(fv_kv_pool_t *pool, uint32_t page_class, fv_page_ref_t page)
{
    size_t offset = (size_t)page * FV_PAGE_UNIT;
    size_t s = offset / pool->slab_bytes;
    slab_t *slab = &pool->slabs[s];

    FV_ASSERT(fv_kv_pool_check(pool, page_class, page) == FV_OK);
    if (slab->page_class == NONE) {
        slab->page_class = page_class;
        slab->n_used = 0;
        pool->n_slabs_seen = (s < pool->n_slabs_seen) ? pool->n_slabs_seen : ((uint32_t)s + 1U);
    }
    uint32_t *word = &pool->words[s * pool->words_per_slab +
                                  offset % pool->slab_bytes / pool->classes[page_class].page_bytes];
    if (*word == 0U) {
        slab->n_used++;
        pool->n_pages_held++;
    }
    (*word)++;
}

/* The pages of an adopted slab that nobody has become its list of free ones. */
static void adopt_slab(fv_kv_pool_t *pool, uint32_t s)
{
    slab_t *slab = &pool->slabs[s];
    page_class_t *c = &pool->classes[slab->page_class];
    uint32_t *words = &pool->words[(size_t)s * pool->words_per_slab];

    slab->n_fresh = c->pages_per_slab;
    slab->free_head = LIST_END;
    for (uint32_t i = c->pages_per_slab; i > 0U; i--) {
        if (words[i - 1U] == 0U) {
            words[i - 1U] = PAGE_FREE | slab->free_head;
            slab->free_head = i - 1U;
        }
    }
    c->n_slabs++;
    c->n_free += c->pages_per_slab - slab->n_used;
    if (slab->n_used < c->pages_per_slab) {
        link_partial(pool, s);
    }
}

void fv_kv_pool_adopt_end(fv_kv_pool_t *pool)
{
    pool->free_slabs = NONE;
    pool->n_slabs_free = 0;
    for (uint32_t s = pool->n_slabs; s > 0U; s--) {
        slab_t *slab = &pool->slabs[s - 1U];

        if (slab->page_class == NONE) {
            slab->next = pool->free_slabs;
            pool->free_slabs = s - 1U;
            pool->n_slabs_free++;
        } else {
            adopt_slab(pool, s - 1U);
        }
    }
}

uint32_t fv_kv_pool_slabs_seen(const fv_kv_pool_t *pool)
{
    return pool->n_slabs_seen;
}

/* ------------------------------------------------------------------ figures */

uint64_t fv_kv_pool_bytes_free(const fv_kv_pool_t *pool)
{
    uint64_t bytes = (uint64_t)pool->n_slabs_free * pool->slab_bytes;

    for (uint32_t i = 0; i < pool->n_classes; i++) {
        bytes += (uint64_t)pool->classes[i].n_free * pool->classes[i].page_bytes;
    }
    return bytes;
}

uint32_t fv_kv_pool_pages_free(const fv_kv_pool_t *pool, uint32_t page_class)
{
    return pool->classes[page_class].n_free;
}

void fv_kv_pool_stats(const fv_kv_pool_t *pool, fv_kv_pool_stats_t *out)
{
    *out = (fv_kv_pool_stats_t){
        .bytes_total = (uint64_t)pool->n_slabs * pool->slab_bytes,
        .bytes_free = fv_kv_pool_bytes_free(pool),
        .table_bytes = sizeof(*pool) + pool->n_slabs * sizeof(*pool->slabs) +
                       (uint64_t)pool->n_slabs * pool->words_per_slab * sizeof(*pool->words),
        .slab_bytes = pool->slab_bytes,
        .n_slabs = pool->n_slabs,
        .n_slabs_free = pool->n_slabs_free,
        .n_classes = pool->n_classes,
        .n_pages_held = pool->n_pages_held,
    };
    for (uint32_t i = 0; i < pool->n_classes; i++) {
        const page_class_t *c = &pool->classes[i];

        out->bytes_lost += (uint64_t)c->n_slabs * (pool->slab_bytes % c->page_bytes);
    }
}
