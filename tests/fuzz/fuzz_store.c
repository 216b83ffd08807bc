/*
 * fuzz_store.c - any bytes as the records of a slot's journal, or of its log on a disk, and what a worker makes of them.
 *
 * Input: byte 0 says which of both, and whether checksums are made right, so that what is behind them is reached; then what
 *        follows the file's head.
 * Checks: the worker starts, keeps or refuses each session, gives every page back in the end, and answers for what it kept;
 *        what it writes anew is read again as a whole.
 */
#include "common/disklog_format.h"
#include "tests/support/store_life.h"
#include "tests/support/test.h"
#include "worker/internal.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define IS_LOG     1U
#define IS_MENDED  2U
#define BYTES_MAX  ((size_t)1 << 20)
#define LOG_ID     0x1234U
#define TOKENS_MAX 256U

/* NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void check(bool ok, const char *what)
{
    if (!ok) {
        (void)fprintf(stderr, "fuzz_store: %s: %s\n", what, fv_error_context());
        abort();
    }
}

/* Wherever a record's head stands, its checksums hold. */
static void mend(uint8_t *data, size_t n_bytes)
{
    fv_journal_disk_record_t disk;

    for (size_t at = 0; at + sizeof(disk) <= n_bytes; at += 8U) {
        memcpy(&disk, data + at, sizeof(disk));
        if ((disk.magic != FV_JOURNAL_RECORD_MAGIC) ||
            (disk.n_bytes > n_bytes - at - sizeof(disk))) {
            continue;
        }
        disk.body_crc = fv_crc32c(0, data + at + sizeof(disk), disk.n_bytes);
        disk.head_crc = fv_journal_record_crc(&disk);
        memcpy(data + at, &disk, sizeof(disk));
    }
}

static void write_file(const char *path, uint8_t *data, size_t n_bytes, bool is_log)
{
    uint8_t page[FV_JOURNAL_HEAD_BYTES] = {0};
    uint64_t word = fv_journal_pack_committed(n_bytes / 8U * 8U);
    fv_journal_disk_head_t disk = {.version = FV_JOURNAL_VERSION,
                                   .head = {.kind = "worker",
                                            .layout = "cpu",
                                            .n_slots = 1,
                                            .kv_bytes = FV_LIFE_ARENA,
                                            .disk_id = is_log ? LOG_ID : 0U}};

    memcpy(disk.magic, is_log ? FV_DISKLOG_MAGIC : FV_JOURNAL_MAGIC, sizeof(disk.magic));
    memcpy(disk.head.job, fv_life_place.job, sizeof(disk.head.job));
    disk.crc = fv_journal_head_crc(&disk);
    memcpy(page, &disk, sizeof(disk));
    memcpy(page + FV_JOURNAL_COMMITTED_AT, &word, sizeof(word));
    FILE *file = fopen(path, "wb");
    check((file != NULL) && (fwrite(page, 1, sizeof(page), file) == sizeof(page)) &&
              (fwrite(data, 1, n_bytes, file) == n_bytes) && (fclose(file) == 0),
          path);
}

static fv_worker_t *make_worker(void)
{
    const fv_worker_config_t config = {
        .n_ranks = 1,
        .backend = &fv_life_ops,
        .backend_config = {.kv_arena_bytes = FV_LIFE_ARENA, .n_threads = 1},
        .store = &fv_life_place};
    fv_worker_t *worker = NULL;

    check(fv_worker_create(&config, &worker) == FV_OK, "the worker");
    return worker;
}

/* As long as it is here, whatever that is. */
static bool keep_some(fv_worker_t *worker, uint32_t slot, uint64_t lengths[FV_LIFE_LAYERS])
{
    const fv_session_t *session = fv_worker_session(worker, slot);

    for (uint32_t i = 0; (session != NULL) && (i < FV_LIFE_LAYERS); i++) {
        bool has_layer = (session->layers != NULL) && (i < (uint32_t)session->model->spec.n_layers);
        lengths[i] = has_layer ? session->layers[i].length : 0U;
    }
    return (session != NULL) && (fv_life_keep_as(worker, slot, session->id, lengths) == FV_OK);
}

static uint32_t keep_all(fv_worker_t *worker, uint64_t lengths[][FV_LIFE_LAYERS])
{
    const fv_ctl_model_t model = fv_life_model();
    uint32_t kept = 0;

    check(fv_worker_model(worker, &model) == FV_OK, "the model");
    for (uint32_t slot = 0; slot <= FV_LIFE_SESSIONS; slot++) {
        kept |= keep_some(worker, slot, lengths[slot]) ? (1U << slot) : 0U;
    }
    check(fv_worker_keep_end(worker) == FV_OK, "the end of keeping");
    return kept;
}

/* A query over what was kept reads every page that it may; whether its policy has freed them is not ours to know. */
static void use(fv_worker_t *worker, uint32_t kept, uint64_t lengths[][FV_LIFE_LAYERS])
{
    static float out[TOKENS_MAX * FV_LIFE_HEADS * FV_LIFE_DIM];

    for (uint32_t slot = 0; slot <= FV_LIFE_SESSIONS; slot++) {
        for (uint32_t i = 0; ((kept & (1U << slot)) != 0U) && (i < FV_LIFE_LAYERS); i++) {
            if ((lengths[slot][i] > 0U) && (lengths[slot][i] < (1U << 20U))) {
                (void)fv_life_try_run(worker, slot, i, lengths[slot][i] - 1U, 1, false, out);
            }
        }
    }
}

static void close_all(fv_worker_t *worker, uint32_t kept)
{
    fv_ctl_memory_t memory;

    for (uint32_t slot = 0; slot <= FV_LIFE_SESSIONS; slot++) {
        const fv_ctl_close_t message = {.session_slot = slot};
        check(((kept & (1U << slot)) == 0U) || (fv_worker_close(worker, &message) == FV_OK),
              "closing");
    }
    fv_worker_memory(worker, &memory);
    check(memory.kv_bytes_free == memory.kv_bytes_total, "pages are left");
}

static void play(uint8_t *data, size_t n_bytes, bool is_log)
{
    static uint64_t lengths[FV_LIFE_SESSIONS + 1U][FV_LIFE_LAYERS];
    char path[FV_STORE_PATH_BYTES];
    const fv_store_place_t memory = fv_life_place;

    memset(lengths, 0, sizeof(lengths));
    if (is_log) {
        char base[FV_STORE_DIR_BYTES];
        (void)snprintf(base, sizeof(base), "%.*s", (int)(strlen(memory.dir) - strlen("/unit")),
                       memory.dir);
        check(fv_store_place_disk(&fv_life_place, base) == FV_OK, "the place");
    }
    check(fv_store_prepare(&fv_life_place) == FV_OK, "the folder");
    fv_store_path(&fv_life_place, is_log ? FV_STORE_LOG : FV_STORE_TABLES, path);
    write_file(path, data, n_bytes, is_log);
    if (!is_log) { /* its pages: zeros */
        fv_store_path(&fv_life_place, FV_STORE_PAGES, path);
        int fd = open(path, O_CREAT | O_RDWR | O_TRUNC, 0600);
        check((fd >= 0) && (ftruncate(fd, (off_t)(FV_LIFE_ARENA + FV_KV_ARENA_SLACK)) == 0) &&
                  (close(fd) == 0),
              path);
    }
    fv_worker_t *worker = make_worker();
    uint32_t kept = keep_all(worker, lengths);
    use(worker, kept, lengths);
    fv_worker_destroy(worker);
    worker = make_worker(); /* what was written anew */
    check(keep_all(worker, lengths) == kept, "what was kept is not there again");
    close_all(worker, kept);
    fv_worker_discard_store(worker);
    fv_worker_destroy(worker);
    fv_life_place = memory;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    if ((n_bytes < 1U) || (n_bytes > BYTES_MAX)) {
        return 0;
    }
    uint8_t *copy = malloc(n_bytes);
    check((copy != NULL) && (fv_life_make_folder(NULL) == 0), "the folder");
    memcpy(copy, data + 1, n_bytes - 1U);
    if ((data[0] & IS_MENDED) != 0U) {
        mend(copy, n_bytes - 1U);
    }
    fv_life_ops = fv_backend_cpu;
    play(copy, n_bytes - 1U, (data[0] & IS_LOG) != 0U);
    (void)fv_life_remove_folder(NULL);
    free(copy);
    return 0;
}
