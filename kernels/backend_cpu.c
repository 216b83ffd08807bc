/*
 * backend_cpu.c - the CPU backend: its memory, its threads and its table of operations.
 *
 * All memory comes from create(): the KV arena (mapped, touched only as pages are written), one block of
 * working memory per thread and two slots per share. Only the table of row groups grows, to the largest step seen.
 */
#define _GNU_SOURCE /* MAP_ANONYMOUS, MADV_HUGEPAGE */
#include "kernels/backend_cpu.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define THREADS_MAX       1024
#define SHARES_PER_THREAD 4 /* a thread that is held up leaves the rest of its work to the others */
#define ALIGNMENT         64U
#define ROWS_PADDED       ((size_t)FV_BLOCK_ROWS_MAX + 16U) /* AMX works on 16 rows at a time */
#define DIM_MAX           ((size_t)FV_DIM_QK_MAX)           /* touched as far as a step needs it */
#define PAGE_ELEMS        (DIM_MAX * FV_PAGE_TOKENS)

/* Hands out pieces of the workspace; with base NULL it only counts. */
typedef struct carver {
    uint8_t *base;
    size_t n_bytes;
} carver_t;

static void *carve(carver_t *carver, size_t n_elems, size_t elem_bytes)
{
    uint8_t *at = (carver->base == NULL) ? NULL : (carver->base + carver->n_bytes);

    carver->n_bytes += fv_align_up(n_elems * elem_bytes, ALIGNMENT);
    return at;
}

static void carve_block(carver_t *carver, fv_tile_block_t *block)
{
    block->q = carve(carver, ROWS_PADDED * DIM_MAX, sizeof(float));
    block->s = carve(carver, ROWS_PADDED * FV_PAGE_TOKENS, sizeof(float));
    block->o = carve(carver, ROWS_PADDED * DIM_MAX, sizeof(float));
    block->m = carve(carver, ROWS_PADDED, sizeof(float));
    block->l = carve(carver, ROWS_PADDED, sizeof(float));
    block->alpha = carve(carver, ROWS_PADDED, sizeof(float));
    block->wide = carve(carver, PAGE_ELEMS + ALIGNMENT, sizeof(float));
    block->q_planes = carve(carver, FV_Q_PLANES_MAX * ROWS_PADDED * DIM_MAX, sizeof(uint16_t));
    block->p_planes = carve(carver, FV_P_PLANES * ROWS_PADDED * FV_PAGE_TOKENS, sizeof(uint16_t));
    block->unpacked = carve(carver, PAGE_ELEMS + ALIGNMENT, sizeof(float));
    block->v_clean = carve(carver, PAGE_ELEMS + ALIGNMENT, sizeof(float));
}

static void carve_all(fv_backend_t *backend, carver_t *carver)
{
    for (int32_t i = 0; i < backend->n_threads; i++) {
        carve_block(carver, &backend->blocks[i]);
    }
    for (int32_t i = 0; i < 2 * backend->n_shares_max; i++) {
        fv_cpu_slot_t *slot = &backend->slots[i];

        slot->o = carve(carver, ROWS_PADDED * DIM_MAX, sizeof(float));
        slot->m = carve(carver, ROWS_PADDED, sizeof(float));
        slot->l = carve(carver, ROWS_PADDED, sizeof(float));
    }
}

static fv_status_t map_memory(const char *what, size_t n_bytes, uint8_t **out)
{
    void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED) {
        return fv_fail(FV_ERR_NO_MEMORY, "cpu backend: %s: mmap of %zu bytes: errno %d", what,
                       n_bytes, errno);
    }
    /* Huge pages spare the TLB while KV streams; without them all still works. */
    (void)madvise(memory, n_bytes, MADV_HUGEPAGE);
    *out = memory;
    return FV_OK;
}

static fv_status_t make_tables(fv_backend_t *backend)
{
    carver_t carver = {.base = NULL, .n_bytes = 0};

    backend->blocks = calloc((size_t)backend->n_threads, sizeof(backend->blocks[0]));
    backend->slots = calloc(2U * (size_t)backend->n_shares_max, sizeof(backend->slots[0]));
    backend->arrived = calloc((size_t)backend->n_shares_max, sizeof(backend->arrived[0]));
    if ((backend->blocks == NULL) || (backend->slots == NULL) || (backend->arrived == NULL)) {
        return fv_fail(FV_ERR_NO_MEMORY, "cpu backend: no memory for %d threads",
                       backend->n_threads);
    }
    carve_all(backend, &carver);
    backend->workspace_bytes = carver.n_bytes;
    FV_RETURN_IF_ERR(map_memory("workspace", backend->workspace_bytes, &backend->workspace));
    carver = (carver_t){.base = backend->workspace, .n_bytes = 0};
    carve_all(backend, &carver);
    return FV_OK;
}

static void cpu_destroy(fv_backend_t *backend)
{
    if (backend == NULL) {
        return;
    }
    fv_pool_destroy(backend->pool);
    if (backend->workspace != NULL) {
        (void)munmap(backend->workspace, backend->workspace_bytes);
    }
    if ((backend->arena != NULL) && (backend->arena_map_bytes > 0U)) {
        (void)munmap(backend->arena, backend->arena_map_bytes);
    }
    free(backend->groups);
    free(backend->arrived);
    free(backend->slots);
    free(backend->blocks);
    free(backend);
}

/* Everything cpu_create() holds; what is half made is freed by its caller. */
static fv_status_t cpu_init(fv_backend_t *backend, const fv_backend_config_t *config)
{
    if ((config->n_threads < 0) || (config->n_threads > THREADS_MAX)) {
        return fv_fail(FV_ERR_INVALID_ARG, "threads: given %d, expected 0..%d", config->n_threads,
                       THREADS_MAX);
    }
    if ((config->kv_arena_bytes % FV_PAGE_UNIT) != 0) {
        return fv_fail(FV_ERR_INVALID_ARG, "kv_arena_bytes: given %zu, expected a multiple of %d",
                       config->kv_arena_bytes, FV_PAGE_UNIT);
    }
    FV_RETURN_IF_ERR(fv_isa_choose(config->isa, &backend->isa));
    backend->n_threads = (config->n_threads == 0) ? fv_pool_cpus() : config->n_threads;
    /* one thread cuts nothing: its results do not depend on what else is in the step */
    backend->n_shares_max =
        (backend->n_threads == 1) ? 1 : (backend->n_threads * SHARES_PER_THREAD);
    backend->kv_arena_bytes = config->kv_arena_bytes;
    if (config->kv_arena != NULL) {
        backend->arena = config->kv_arena;
    } else {
        backend->arena_map_bytes = config->kv_arena_bytes + FV_KV_ARENA_SLACK;
        FV_RETURN_IF_ERR(map_memory("KV arena", backend->arena_map_bytes, &backend->arena));
    }
    FV_RETURN_IF_ERR(make_tables(backend));
    return fv_pool_create(backend->n_threads, &backend->pool);
}

static fv_status_t cpu_create(const fv_backend_config_t *config, fv_backend_t **out)
{
    fv_backend_t *backend = calloc(1, sizeof(*backend));
    fv_status_t status = FV_OK;

    if (backend == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "cpu backend: no memory");
    }
    status = cpu_init(backend, config);
    if (status != FV_OK) {
        cpu_destroy(backend);
        return status;
    }
    *out = backend;
    return FV_OK;
}

/* "model name" of /proc/cpuinfo, or "CPU". */
static void cpu_model(char *out, size_t n_bytes)
{
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");

    (void)snprintf(out, n_bytes, "CPU");
    if (file == NULL) {
        return;
    }
    while (fgets(line, (int)sizeof(line), file) != NULL) {
        const char *colon = strchr(line, ':');

        if ((strncmp(line, "model name", 10) == 0) && (colon != NULL)) {
            (void)snprintf(out, n_bytes, "%s", colon + 2);
            out[strcspn(out, "\n")] = '\0';
            break;
        }
    }
    (void)fclose(file);
}

static void cpu_describe(const fv_backend_t *backend, fv_device_info_t *out)
{
    char model[64];

    memset(out, 0, sizeof(*out));
    cpu_model(model, sizeof(model));
    (void)snprintf(out->device, sizeof(out->device), "%s, %d threads, %s", model,
                   backend->n_threads, backend->isa.name);
    out->n_threads = backend->n_threads;
    out->kv_arena_bytes = backend->kv_arena_bytes;
    out->workspace_bytes = backend->workspace_bytes;
}

static fv_status_t cpu_host_alloc(fv_backend_t *backend, size_t n_bytes, void **out)
{
    void *memory = NULL;

    (void)backend;
    if (posix_memalign(&memory, 4096U, (n_bytes > 0U) ? n_bytes : 1U) != 0) {
        return fv_fail(FV_ERR_NO_MEMORY, "cpu backend: no memory for a buffer of %zu bytes",
                       n_bytes);
    }
    *out = memory;
    return FV_OK;
}

static void cpu_host_free(fv_backend_t *backend, void *memory)
{
    (void)backend;
    free(memory);
}

static void *cpu_kv_base(fv_backend_t *backend)
{
    return backend->arena;
}

static fv_status_t
cpu_finish(fv_backend_t *backend, const fv_wait_limits_t *limits, fv_device_times_t *out_times)
{
    (void)backend; /* every call returns when its work is done */
    (void)limits;
    if (out_times != NULL) {
        *out_times = (fv_device_times_t){.is_known = false};
    }
    return FV_OK;
}

const fv_backend_ops_t fv_backend_cpu = {
    .name = "cpu",
    .kv_home = FV_KV_HOST,
    .has_latent = true,
    .has_fp8_latent = true,
    .create = cpu_create,
    .destroy = cpu_destroy,
    .describe = cpu_describe,
    .host_alloc = cpu_host_alloc,
    .host_free = cpu_host_free,
    .append = fv_cpu_append,
    .kv_base = cpu_kv_base,
    .copy_pages = fv_cpu_copy_pages,
    .attend = fv_cpu_attend,
    .score_count = fv_cpu_score_count,
    .scores = fv_cpu_scores,
    .merge = fv_cpu_merge,
    .empty = fv_cpu_empty,
    .finish = cpu_finish,
};
