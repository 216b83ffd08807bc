/*
 * main_store.c - where a job's durable state lies: its name, its folder, its size.
 */
#include "coord/main_store.h"

#include "common/disklog.h"
#include "common/log.h"
#include "coord/resources.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB              ((uint64_t)1 << 20)
#define LOG_BYTES_PER_MS 50000U /* a cold disk, every byte looked at several times */
#define LOG_MS_MAX       ((uint64_t)24 * 3600 * 1000)

void fv_main_store_job(const fv_config_t *config, char out[FV_JOURNAL_JOB_BYTES])
{
    if (config->job[0] != '\0') {
        (void)snprintf(out, FV_JOURNAL_JOB_BYTES, "%.*s", FV_JOURNAL_JOB_BYTES - 1, config->job);
        return;
    }
    fv_store_job_name((config->listen.n > 0) ? config->listen.text[0] : "", out);
    if (out[0] == '\0') {
        (void)snprintf(out, FV_JOURNAL_JOB_BYTES, FV_STORE_ANONYMOUS "%ld", (long)getpid());
    }
}

/* Another rank of this host may be doing the same. */
static fv_status_t discard_old(const fv_store_place_t *place)
{
    char path[FV_STORE_PATH_BYTES];

    for (int file = FV_STORE_COORDINATOR; file <= FV_STORE_LOG; file++) {
        bool is_disk = (file == FV_STORE_LOG) || (file == FV_STORE_COORDINATOR_LOG);
        bool is_coordinator = (file == FV_STORE_COORDINATOR) || (file == FV_STORE_COORDINATOR_LOG);
        if ((!is_coordinator || (place->slot == 0)) && (!is_disk || (place->disk_dir[0] != '\0'))) {
            fv_store_path(place, (fv_store_file_t)file, path);
            FV_RETURN_IF_ERR(fv_store_delete_file(path));
        }
    }
    return FV_OK;
}

/*
 * What a disk has of the job would be believed again where memory has nothing, without what this level does not put there.
 */
static fv_status_t refuse_old_logs(const fv_main_store_t *store, const fv_config_t *config)
{
    static const fv_store_file_t k_logs[] = {FV_STORE_LOG, FV_STORE_COORDINATOR_LOG};
    fv_store_place_t old = store->place;
    char path[FV_STORE_PATH_BYTES];

    FV_RETURN_IF_ERR(fv_store_place_disk(&old, config->disk_dir));
    for (size_t i = 0; i < sizeof(k_logs) / sizeof(k_logs[0]); i++) {
        fv_store_path(&old, k_logs[i], path);
        if (access(path, F_OK) == 0) {
            return fv_fail(
                FV_ERR_PRECONDITION,
                "durability: given %s, expected host: %s has this job's sessions and would "
                "grow old; `fovea store rm --dir %s` forgets them",
                config->durability, path, config->disk_dir);
        }
    }
    return FV_OK;
}

fv_status_t fv_main_store_open(const fv_config_t *config,
                               const char *job,
                               uint32_t rank,
                               uint32_t n_ranks,
                               fv_main_store_t *out)
{
    fv_main_store_t store = {.is_on = strcmp(config->durability, "none") != 0};
    bool is_host = strcmp(config->durability, "host") == 0;

    if (is_host && (config->disk_dir[0] == '\0')) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "disk_dir: given nothing, expected a folder on a disk, with durability = "
                       "host");
    }
    if (strlen(config->job) >= FV_JOURNAL_JOB_BYTES) {
        return fv_fail(FV_ERR_INVALID_ARG, "job: given %s, expected at most %d characters",
                       config->job, FV_JOURNAL_JOB_BYTES - 1);
    }
    if (store.is_on) {
        store.is_anonymous = strncmp(job, FV_STORE_ANONYMOUS, strlen(FV_STORE_ANONYMOUS)) == 0;
        FV_RETURN_IF_ERR(fv_store_place_make(config->store_dir, job, rank, n_ranks, &store.place));
        if (is_host) {
            FV_RETURN_IF_ERR(fv_store_place_disk(&store.place, config->disk_dir));
        } else if (config->disk_dir[0] != '\0') {
            FV_RETURN_IF_ERR(refuse_old_logs(&store, config));
        }
        FV_RETURN_IF_ERR(fv_store_prepare(&store.place)); /* from here on it is known to be ours */
        uint32_t n_swept = fv_store_sweep(config->store_dir);
        if (n_swept > 0) {
            fv_info("durability: %u stores that nobody could find again are swept", n_swept);
        }
        if (config->store_discard) {
            FV_RETURN_IF_ERR(discard_old(&store.place));
        }
    }
    *out = store;
    return FV_OK;
}

/* KV bytes of a store that is there; 0: there is none. */
static uint64_t known_bytes(const fv_store_place_t *place)
{
    char path[FV_STORE_PATH_BYTES];
    fv_journal_head_t head = {0};
    fv_journal_report_t report;
    bool is_locked = false;

    fv_store_path(place, FV_STORE_TABLES, path);
    if (fv_journal_inspect(path, NULL, NULL, &head, &report, &is_locked) == FV_OK) {
        return head.kv_bytes;
    }
    fv_store_path(place, FV_STORE_LOG, path);
    return ((place->disk_dir[0] != '\0') && (fv_disklog_head(path, &head) == FV_OK)) ? head.kv_bytes
                                                                                     : 0U;
}

fv_status_t fv_main_store_kv_memory(const fv_main_store_t *store,
                                    const fv_memory_limit_t *limit,
                                    int32_t n_local_ranks,
                                    uint64_t *inout_bytes)
{
    uint64_t n_free = 0;
    uint64_t n_all = 0;
    char text[24];

    if (!store->is_on || (limit->percent == 0)) {
        return FV_OK;
    }
    uint64_t n_known = known_bytes(&store->place);
    if (n_known > 0) {
        *inout_bytes = n_known;
        return FV_OK;
    }
    if (!fv_store_space(&store->place, &n_free, &n_all)) {
        return FV_OK;
    }
    /* a tenth is left for journals and others */
    uint64_t n_most = n_free / 10U * 9U / (uint64_t)n_local_ranks / MIB * MIB;
    if (n_most >= *inout_bytes) {
        return FV_OK;
    }
    if (n_most < *inout_bytes / 4U) {
        return fv_fail(
            FV_ERR_EXHAUSTED,
            "store_dir: %s has %llu MiB free, kv_memory %d%% of %d ranks would be %llu MiB "
            "each: make it larger (of a container: --shm-size), name another store_dir, "
            "give kv_memory in bytes, or set durability to none",
            store->place.dir, (unsigned long long)(n_free / MIB), limit->percent, n_local_ranks,
            (unsigned long long)(*inout_bytes / MIB));
    }
    *inout_bytes = n_most;
    fv_info("memory: KV cache %s: no more fits into %s beside the rest",
            fv_format_bytes(n_most, text), store->place.dir);
    return FV_OK;
}

/* ------------------------------------------------------------------ how long */

static bool has_logs(const fv_config_t *config)
{
    return strcmp(config->durability, "host") == 0;
}

uint64_t fv_main_store_log_bytes(const fv_config_t *config, const char *job, uint32_t slot)
{
    fv_store_place_t place;
    char path[FV_STORE_PATH_BYTES];
    struct stat info;

    if (!has_logs(config) ||
        (fv_store_place_make(config->store_dir, job, slot, slot + 1U, &place) != FV_OK) ||
        (fv_store_place_disk(&place, config->disk_dir) != FV_OK)) {
        return 0;
    }
    fv_store_path(&place, FV_STORE_LOG, path);
    return (stat(path, &info) == 0) ? (uint64_t)info.st_size : 0U;
}

uint64_t fv_main_store_log_most(const fv_config_t *config, uint64_t kv_bytes)
{
    /* begun anew when it takes more than two times what it holds and 256 MiB */
    return has_logs(config) ? (2U * kv_bytes + 256U * MIB) : 0U;
}

uint32_t fv_main_store_log_ms(uint64_t n_bytes)
{
    uint64_t ms = n_bytes / LOG_BYTES_PER_MS;

    return (uint32_t)((ms < LOG_MS_MAX) ? ms : LOG_MS_MAX);
}
