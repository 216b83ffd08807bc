/*
 * bench_exchange_nccl.c - what the exchange between GPUs and the merge add to a decode step.
 *
 *     mpirun -np N bench_exchange_nccl        (one GPU a rank)
 *
 * Decode, 32 query heads, 8 KV heads, d = 128, bf16, every row's KV on all ranks, so every rank merges 1/N of the rows.
 * First table: device time of a step with exchange minus that of the same attention with its states left at home.
 * Second table: the end of an exchange alone (signal, wait, merge; with NCCL's send and receive the transfer too), by the
 * bytes that each rank sends to each other one. Every sample is a pair of calls that ends with finish(), as the service
 * does it: memory is cleared, behind which all launches of the sample hide, an exchange in which the ranks meet, and then,
 * between two events, what is measured. Means of the middle half of the samples (events count in half microseconds); the
 * slowest rank counts.
 */
#include "worker/worker.h"

#include <cuda_runtime_api.h>
#include <mpi.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEADS      32
#define KV_HEADS   8
#define DIM        128
#define BATCH_MAX  64
#define RANKS_MAX  16
#define ARENA      ((size_t)3 << 30)
#define PAGE_BYTES ((size_t)FV_PAGE_TOKENS * DIM * 2U * 2U)
#define SAMPLES    100
#define CLEARS \
    3 /* of the states at home, over 1 ms: no launch takes as long, and L2 holds nothing after it */
#define ROWS_MAX 8192 /* of one message of the second table: 4 MiB and a bit */

#define MUST(expr)                                                                         \
    do {                                                                                   \
        if ((expr) != FV_OK) {                                                             \
            (void)fprintf(stderr, "rank %d: %s: %s\n", s_rank, #expr, fv_error_context()); \
            MPI_Abort(MPI_COMM_WORLD, 1);                                                  \
        }                                                                                  \
    } while (0)

static int s_rank, s_n;
static size_t s_home_bytes;
static fv_backend_t *s_backend;
static const fv_backend_ops_t *const k_ops = &fv_backend_cuda;

typedef struct workload {
    int batch;
    int64_t context; /* tokens of each rank */
    fv_page_ref_t *pages;
    uint8_t *q, *out;    /* pinned */
    float *home;         /* device: states that do not travel */
    uint8_t *device_out; /* device: results of the second table, which is not about the bus */
    fv_attn_item_t items[BATCH_MAX];
    fv_partial_dst_t dsts[BATCH_MAX][RANKS_MAX];
    fv_merge_item_t merges[BATCH_MAX];
    const float *parts[BATCH_MAX][2][RANKS_MAX];
} workload_t;

static workload_t s_work;

/* What a step does with its states. */
typedef enum what {
    STAY, /* they stay at home */
    ANSWER, /* no states: all rows of the rank are final and go to the host, as if no other rank held any */
    WRITE,   /* they are written to the peers, and nobody waits */
    MERGE,   /* the whole exchange; `exchange` says which way */
    AT_HOME, /* states at home are merged there: no peer */
} what_t;

typedef struct way {
    what_t what;
    fv_exchange_nccl_t *exchange;
} way_t;

static void *pinned(size_t n_bytes)
{
    void *p = NULL;

    MUST(k_ops->host_alloc(s_backend, n_bytes, &p));
    for (size_t i = 0; i < n_bytes / 2U; i++) { /* bf16 of about +-0.5 */
        ((uint16_t *)p)[i] =
            (uint16_t)(0x3e80U + (unsigned)rand() % 0x80U + ((rand() % 2 == 0) ? 0x8000U : 0U));
    }
    return p;
}

/* ------------------------------------------------------------------ the workload */

static void fill_cache(workload_t *w)
{
    const int64_t chunk = (w->context < 2048) ? w->context : 2048;
    uint8_t *kv = pinned((size_t)chunk * KV_HEADS * DIM * 2U * 2U);
    const size_t n_pages = (size_t)(w->context / FV_PAGE_TOKENS);

    for (int i = 0; i < w->batch; i++) {
        for (int64_t at = 0; at < w->context; at += chunk) {
            fv_append_item_t item = {
                .n_kv_heads = KV_HEADS,
                .head_dim_qk = DIM,
                .head_dim_v = DIM,
                .src_dtype = FV_DTYPE_BF16,
                .kv_dtype = FV_DTYPE_BF16,
                .k = kv,
                .v = kv + (size_t)chunk * KV_HEADS * DIM * 2U,
                .k_token_bytes = (size_t)KV_HEADS * DIM * 2U,
                .v_token_bytes = (size_t)KV_HEADS * DIM * 2U,
                .local_begin = (uint64_t)at,
                .n_tokens = (uint64_t)chunk,
                .pages = w->pages + (size_t)i * KV_HEADS * n_pages,
                .pages_head_stride = n_pages,
            };

            MUST(k_ops->append(s_backend, &item, 1));
            MUST(k_ops->finish(s_backend, NULL, NULL));
        }
    }
    k_ops->host_free(s_backend, kv);
}

static void make_workload(workload_t *w, int batch, int64_t context)
{
    const size_t n_pages = (size_t)(context / FV_PAGE_TOKENS);

    w->batch = batch;
    w->context = context;
    free(w->pages);
    w->pages = malloc((size_t)batch * KV_HEADS * n_pages * sizeof(*w->pages));
    for (size_t i = 0; i < (size_t)batch * KV_HEADS * n_pages; i++) { /* scattered */
        size_t n = (size_t)batch * KV_HEADS * n_pages;

        w->pages[i] = (fv_page_ref_t)((i * 7919U % n) * (PAGE_BYTES / FV_PAGE_UNIT));
    }
    fill_cache(w);
    for (int i = 0; i < batch; i++) {
        w->items[i] = (fv_attn_item_t){
            .n_tokens = 1,
            .n_kv_heads = KV_HEADS,
            .group = HEADS / KV_HEADS,
            .head_dim_qk = DIM,
            .head_dim_v = DIM,
            .io_dtype = FV_DTYPE_BF16,
            .kv_dtype = FV_DTYPE_BF16,
            .softmax_scale = 0.088388F,
            .causal = true,
            .policy = {.kind = FV_POLICY_DENSE},
            .shard = {.shard_tokens = FV_PAGE_TOKENS, .n_parts = 1},
            .position = context - 1,
            .kv_end = context,
            .q = w->q + (size_t)i * HEADS * DIM * 2U,
            .q_token_bytes = (size_t)HEADS * DIM * 2U,
            .pages = w->pages + (size_t)i * KV_HEADS * n_pages,
            .pages_head_stride = n_pages,
            .dst = w->dsts[i],
            .n_dst = s_n,
        };
    }
}

static int row_begin(int rows, int part)
{
    return rows * part / s_n;
}

static size_t chunk_bytes(int rows)
{
    return (size_t)rows * (DIM + 16U) * sizeof(float);
}

/* rows of each item, dealt out over the ranks; the messages of the step are bound to items and merges. */
static size_t bind(workload_t *w,
                   int n_items,
                   int rows,
                   uint8_t *const *send,
                   uint8_t *const *recv,
                   uint8_t *own,
                   uint8_t *out)
{
    size_t at[RANKS_MAX] = {0};
    size_t own_at = 0;
    const int mine = row_begin(rows, s_rank + 1) - row_begin(rows, s_rank);

    for (int i = 0; i < n_items; i++) {
        for (int d = 0; d < s_n; d++) {
            const int n = row_begin(rows, d + 1) - row_begin(rows, d);
            uint8_t *to = (d == s_rank) ? (own + own_at) : (send[d] + at[d]);
            const uint8_t *from = (d == s_rank) ? to : (recv[d] + (size_t)i * chunk_bytes(mine));

            w->dsts[i][d] = (fv_partial_dst_t){
                .row_begin = (uint64_t)row_begin(rows, d),
                .o = (float *)(void *)to,
                .lse_log2 = (float *)(void *)(to + (size_t)n * DIM * sizeof(float))};
            w->parts[i][0][d] = (const float *)(const void *)from;
            w->parts[i][1][d] =
                (const float *)(const void *)(from + (size_t)mine * DIM * sizeof(float));
            at[d] += (d == s_rank) ? 0U : chunk_bytes(n);
        }
        own_at += chunk_bytes(mine);
        w->merges[i] = (fv_merge_item_t){
            .n_rows = (uint64_t)mine,
            .n_parts = s_n,
            .head_dim_v = DIM,
            .io_dtype = FV_DTYPE_BF16,
            .o = w->parts[i][0],
            .lse_log2 = w->parts[i][1],
            .row_len = (uint64_t)mine,
            .out = out + (size_t)i * (size_t)rows * DIM * 2U,
            .out_token_bytes = (size_t)mine * DIM * 2U,
        };
    }
    return own_at;
}

/* One step is enqueued. with_attend false: the exchange and the merge alone. */
static void enqueue(workload_t *w, const way_t *way, int n_items, int rows, bool with_attend)
{
    fv_exchange_peer_t peers[RANKS_MAX];
    uint8_t *send[RANKS_MAX] = {NULL};
    uint8_t *recv[RANKS_MAX] = {NULL};
    uint8_t *own = (uint8_t *)w->home;
    const fv_merge_sync_t *sync = NULL;
    const int mine = row_begin(rows, s_rank + 1) - row_begin(rows, s_rank);
    size_t n = 0;

    for (int d = 0; d < s_n; d++) {
        if (d != s_rank) {
            peers[n++] = (fv_exchange_peer_t){
                .rank = (uint32_t)d,
                .send_bytes =
                    (size_t)n_items * chunk_bytes(row_begin(rows, d + 1) - row_begin(rows, d)),
                .recv_bytes = (size_t)n_items * chunk_bytes(mine)};
        }
    }
    if (way->exchange != NULL) {
        MUST(fv_exchange_nccl_ops.begin(way->exchange, peers, n,
                                        (size_t)n_items * chunk_bytes(mine), &own));
        for (size_t i = 0; i < n; i++) {
            send[peers[i].rank] = peers[i].send;
            recv[peers[i].rank] = peers[i].recv;
        }
    } else {
        for (int d = 0; d < s_n; d++) { /* at home, behind each other */
            send[d] = own + (size_t)(d + 1) * (size_t)n_items * chunk_bytes(rows);
            recv[d] = send[d];
        }
    }
    (void)bind(w, n_items, rows, send, recv, own, with_attend ? w->out : w->device_out);
    for (int i = 0; i < n_items; i++) {
        w->items[i].n_dst = (way->what == ANSWER) ? 0 : s_n;
        w->items[i].out = w->out + (size_t)i * HEADS * DIM * 2U;
        w->items[i].out_token_bytes = (size_t)HEADS * DIM * 2U;
    }
    if (with_attend) {
        MUST(k_ops->attend(s_backend, w->items, (size_t)n_items));
    }
    if (way->what == MERGE) {
        MUST(fv_exchange_nccl_ops.run(way->exchange, peers, n, &sync));
    }
    if ((way->what == MERGE) || (way->what == AT_HOME)) {
        MUST(k_ops->merge(s_backend, w->merges, (size_t)n_items, sync));
    }
}

static void finish(const way_t *way)
{
    const fv_wait_limits_t limits = {.deadline_ms = 20000};
    fv_status_t status = k_ops->finish(s_backend, &limits, NULL);

    if (way->exchange != NULL) {
        status = fv_exchange_nccl_ops.end(way->exchange, status);
    }
    MUST(status);
}

/* ------------------------------------------------------------------ measuring */

static int by_value(const void *a, const void *b)
{
    const double d = *(const double *)a - *(const double *)b;

    return (d > 0.0) - (d < 0.0);
}

/* Mean of the middle half, then the slowest rank. */
static double agree(double *samples, int n)
{
    double mine = 0.0;
    double all = 0.0;

    qsort(samples, (size_t)n, sizeof(*samples), by_value);
    for (int i = n / 4; i < n - n / 4; i++) {
        mine += samples[i] / (n - n / 4 - n / 4);
    }
    MPI_Allreduce(&mine, &all, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    return all;
}

static double elapsed_us(cudaEvent_t from, cudaEvent_t to)
{
    float ms = 0.0F;

    (void)cudaEventElapsedTime(&ms, from, to);
    return (double)ms * 1000.0;
}

/*
 * us of device time of a step, or (with_attend false) of the end of an exchange of `rows` rows of each rank. The ranks
 * meet in an exchange of their own before.
 */
static double time_one(workload_t *w,
                       const way_t *meet,
                       const way_t *way,
                       int n_items,
                       int rows,
                       bool with_attend)
{
    cudaStream_t stream = fv_backend_cuda_stream(s_backend);
    cudaEvent_t events[2];
    double samples[SAMPLES];

    (void)cudaEventCreate(&events[0]);
    (void)cudaEventCreate(&events[1]);
    for (int s = -3; s < SAMPLES; s++) {
        MPI_Barrier(MPI_COMM_WORLD);
        for (int i = 0; i < CLEARS; i++) {
            (void)cudaMemsetAsync(w->home, 0, s_home_bytes, stream);
        }
        enqueue(w, meet, 1, 2 * s_n, false);
        (void)cudaEventRecord(events[0], stream);
        enqueue(w, way, n_items, rows, with_attend);
        (void)cudaEventRecord(events[1], stream);
        finish(meet);
        if (way->exchange != meet->exchange) {
            finish(way);
        }
        if (s >= 0) {
            samples[s] = elapsed_us(events[0], events[1]);
        }
    }
    (void)cudaEventDestroy(events[0]);
    (void)cudaEventDestroy(events[1]);
    return agree(samples, SAMPLES);
}

static double time_steps(workload_t *w, const way_t *ways, int m)
{
    return time_one(w, &ways[3], &ways[m], w->batch, HEADS, true);
}

static double time_ends(workload_t *w, const way_t *meet, const way_t *way, int rows)
{
    return time_one(w, meet, way, 1, rows, false);
}

static fv_exchange_nccl_t *open_exchange(bool is_collective)
{
    fv_exchange_nccl_config_t config = {.rank = (uint32_t)s_rank,
                                        .n_ranks = (uint32_t)s_n,
                                        .device = s_rank % fv_backend_cuda_count(),
                                        .is_collective = is_collective};
    fv_exchange_nccl_t *exchange = NULL;
    char text[160];

    if (s_rank == 0) {
        MUST(fv_exchange_nccl_id(config.id));
    }
    MPI_Bcast(config.id, sizeof(config.id), MPI_BYTE, 0, MPI_COMM_WORLD);
    MUST(fv_exchange_nccl_create(&config, &exchange));
    fv_exchange_nccl_describe(exchange, text, sizeof(text));
    if (s_rank == 0) {
        (void)printf("%s\n", text);
    }
    return exchange;
}

static void table_of_steps(workload_t *w, const way_t *ways)
{
    static const struct {
        int batch;
        int64_t context;
    } k_cases[] = {{1, 4096}, {1, 65536}, {64, 4096}};

    if (s_rank == 0) {
        (void)printf(
            "\n| batch x tokens a rank | states stay | no states, answers to the host | states "
            "written to peers | direct | + | send and receive | + |\n"
            "|---|---|---|---|---|---|---|---|\n");
    }
    for (size_t i = 0; i < sizeof(k_cases) / sizeof(k_cases[0]); i++) {
        double us[5];

        make_workload(w, k_cases[i].batch, k_cases[i].context);
        for (int m = 0; m < 5; m++) {
            us[m] = time_steps(w, ways, m);
        }
        if (s_rank == 0) {
            (void)printf("| %d x %lld | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f |\n",
                         k_cases[i].batch, (long long)k_cases[i].context, us[0], us[1], us[2],
                         us[3], us[3] - us[0], us[4], us[4] - us[0]);
            (void)fflush(stdout);
        }
    }
}

static void table_of_ends(workload_t *w, const way_t *ways)
{
    if (s_rank == 0) {
        (void)printf("\n| bytes to each rank | rows | merge alone | direct | send and receive |\n"
                     "|---|---|---|---|---|\n");
    }
    for (int rows = 2; rows <= ROWS_MAX; rows *= 4) {
        const way_t home = {.what = AT_HOME};
        const double alone = time_ends(w, &ways[3], &home, rows * s_n);
        const double direct = time_ends(w, &ways[3], &ways[3], rows * s_n);
        const double rest = time_ends(w, &ways[3], &ways[4], rows * s_n);

        if (s_rank == 0) {
            (void)printf("| %zu | %d | %.2f | %.2f | %.2f |\n", chunk_bytes(rows), rows, alone,
                         direct, rest);
            (void)fflush(stdout);
        }
    }
}

int main(int argc, char **argv)
{
    way_t ways[5] = {
        {.what = STAY}, {.what = ANSWER}, {.what = WRITE}, {.what = MERGE}, {.what = MERGE}};
    const size_t out_bytes = (size_t)ROWS_MAX * RANKS_MAX * DIM * 2U;
    fv_backend_config_t config = {.kv_arena_bytes = ARENA};

    s_home_bytes = chunk_bytes(ROWS_MAX) * RANKS_MAX * (RANKS_MAX + 1U);
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &s_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &s_n);
    if ((fv_backend_cuda_count() < 1) || (s_n < 2) || (s_n > RANKS_MAX)) {
        (void)printf("skipped: %d GPUs visible, %d ranks\n", fv_backend_cuda_count(), s_n);
        MPI_Finalize();
        return 77;
    }
    ways[3].exchange = open_exchange(false);
    ways[4].exchange = open_exchange(true);
    ways[2].exchange = ways[3].exchange;
    config.device = s_rank % fv_backend_cuda_count();
    MUST(k_ops->create(&config, &s_backend));
    MUST(fv_exchange_nccl_ops.attach(ways[3].exchange, s_backend));
    MUST(fv_exchange_nccl_ops.attach(ways[4].exchange, s_backend));
    s_work.q = pinned((size_t)BATCH_MAX * HEADS * DIM * 2U);
    s_work.out = pinned((size_t)BATCH_MAX * HEADS * DIM * 2U);
    if ((cudaMalloc((void **)&s_work.home, s_home_bytes) != cudaSuccess) ||
        (cudaMalloc((void **)&s_work.device_out, out_bytes) != cudaSuccess)) {
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    (void)cudaMemset(s_work.home, 0, s_home_bytes);
    MUST(fv_backend_cuda_reach(s_backend, s_work.home, s_home_bytes));
    MUST(fv_backend_cuda_reach(s_backend, s_work.device_out, out_bytes));
    table_of_steps(&s_work, ways);
    table_of_ends(&s_work, ways);
    MPI_Barrier(MPI_COMM_WORLD);
    k_ops->destroy(s_backend);
    fv_exchange_nccl_destroy(ways[3].exchange);
    fv_exchange_nccl_destroy(ways[4].exchange);
    MPI_Finalize();
    return 0;
}
