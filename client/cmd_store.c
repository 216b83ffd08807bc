/*
 * cmd_store.c - `fovea store`: the durable state of services on this host, running or not. Talks to no service.
 */
#include "client/cli.h"
#include "common/disklog.h"
#include "common/store.h"
#include "proto/ledger.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct fv_store_args {
    const char *action, *job, *dir;
} fv_store_args_t;

static const struct argp_option k_store_options[] = {
    {"dir", 'd', "DIR", 0, "The services' --store-dir, or --disk-dir; default: /dev/shm/fovea-UID",
     0},
    {0},
};

static error_t parse_store(int key, char *arg, struct argp_state *state)
{
    fv_store_args_t *a = state->input;

    switch (key) {
    case 'd':
        a->dir = arg;
        return 0;
    case ARGP_KEY_ARG:
        if (a->action == NULL) {
            a->action = arg;
        } else if (a->job == NULL) {
            a->job = arg;
        } else {
            argp_usage(state);
        }
        return 0;
    case ARGP_KEY_END:
        if ((a->action == NULL) ||
            ((strcmp(a->action, "ls") != 0) && (strcmp(a->action, "check") != 0) &&
             (strcmp(a->action, "rm") != 0))) {
            argp_error(state, "given \"%s\", expected ls, check or rm",
                       (a->action == NULL) ? "" : a->action);
        }
        if ((strcmp(a->action, "rm") == 0) && (a->job == NULL)) {
            argp_error(state, "rm: expected the name of a job");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp k_store_argp = {
    .options = k_store_options,
    .parser = parse_store,
    .args_doc = "ls|check|rm [JOB]",
    .doc = "What services have stored on this host, so that sessions survive their processes.\n\n"
           "ls      jobs, their files and sessions\n"
           "check   reads all records; exit code 1 when some are damaged\n"
           "rm JOB  deletes a job's files; a running service's are not"
           "\vExit codes: 0 success, 1 damaged, in use or not there, 2 wrong usage.",
};

/* ------------------------------------------------------------------ looking */

typedef struct look {
    const fv_store_args_t *args;
    uint32_t n_jobs;
    bool has_failed;
} look_t;

/* Sessions of a ledger: opened less closed. */
static fv_status_t count_session(void *arg, const fv_journal_record_t *record)
{
    int64_t *n = arg;

    if (record->key < FV_LEDGER_MODEL_KEY) {
        *n += ((record->flags & FV_JOURNAL_FIRST) != 0U) ? 1 : 0;
        *n -= (record->type == FV_LEDGER_CLOSE) ? 1 : 0;
    }
    return FV_OK;
}

/* The journal's records in a log: many at once. */
static fv_status_t count_table(void *arg, const void *records, size_t n_bytes)
{
    fv_journal_report_t report;

    return fv_journal_scan(records, n_bytes, count_session, arg, &report);
}

static void show_journal(look_t *look, const char *path, const char *name, bool is_log)
{
    fv_journal_head_t head = {0};
    fv_journal_report_t r = {0};
    bool is_locked = false;
    int64_t n_sessions = 0;
    const fv_disklog_reader_t reader = {.table = count_table, .arg = &n_sessions};
    fv_status_t status =
        is_log ? fv_disklog_inspect(path, &reader, &head, &r, &is_locked)
               : fv_journal_inspect(path, count_session, &n_sessions, &head, &r, &is_locked);
    /* a batch that did not get through is no damage: it is cut; one may be under way */
    bool is_damaged = (status != FV_OK) || (r.n_damaged > 0) || (r.n_holes > 0) ||
                      ((r.tail_bytes > 0) && !is_log);

    look->has_failed = look->has_failed || is_damaged;
    if (status != FV_OK) {
        (void)printf("  %-24s %s\n", name, fv_error_context());
        return;
    }
    (void)printf("  %-24s %8.1f KiB, %llu records, %lld sessions, rank %u of %u, %s", name,
                 (double)r.n_bytes / 1024.0, (unsigned long long)r.n_records, (long long)n_sessions,
                 head.slot, head.n_slots, is_locked ? "in use" : "not in use");
    if (is_damaged) {
        (void)printf("; DAMAGED: %llu records, %llu holes, %llu bytes at the end",
                     (unsigned long long)r.n_damaged, (unsigned long long)r.n_holes,
                     (unsigned long long)r.tail_bytes);
    }
    (void)printf("\n");
}

static bool ends_with(const char *name, const char *end)
{
    return (strlen(name) >= strlen(end)) && (strcmp(name + strlen(name) - strlen(end), end) == 0);
}

static void show_file(look_t *look, const char *dir, const char *name)
{
    char path[FV_STORE_PATH_BYTES];
    struct stat info;

    if (snprintf(path, sizeof(path), "%s/%s", dir, name) >= (int)sizeof(path)) {
        return;
    }
    if (ends_with(name, ".journal") || ends_with(name, ".log")) {
        show_journal(look, path, name, ends_with(name, ".log"));
    } else if (ends_with(name, ".kv") && (stat(path, &info) == 0)) {
        (void)printf("  %-24s %8.1f MiB, %.1f MiB of memory\n", name,
                     (double)info.st_size / 1048576.0, (double)info.st_blocks * 512.0 / 1048576.0);
    }
}

static bool show_job(void *arg, const char *dir, const char *job)
{
    look_t *look = arg;
    struct dirent **names = NULL;

    if ((look->args->job != NULL) && (strcmp(look->args->job, job) != 0)) {
        return true;
    }
    look->n_jobs++;
    (void)printf("%s  (%s)\n", job, dir);
    int n = scandir(dir, &names, NULL, alphasort);
    for (int i = 0; i < n; i++) {
        show_file(look, dir, names[i]->d_name);
        free(names[i]);
    }
    free(names);
    return true;
}

static int remove_job(const fv_store_args_t *args)
{
    fv_store_place_t place;
    struct stat info;
    fv_status_t status = fv_store_place_make(args->dir, args->job, 0, 1, &place);

    if ((status == FV_OK) && (stat(place.dir, &info) != 0)) {
        status = fv_fail(FV_ERR_NOT_FOUND, "%s: no such job", place.dir);
    }
    if (status == FV_OK) {
        status = fv_store_delete(place.dir);
    }
    if (status != FV_OK) {
        (void)fprintf(stderr, "fovea: %s\n", fv_error_context());
        return FV_EXIT_SERVICE;
    }
    return FV_EXIT_OK;
}

int fv_cmd_store(const fv_cli_t *cli, int argc, char **argv)
{
    fv_store_args_t args = {.dir = ""};
    look_t look = {.args = &args};

    (void)cli;
    (void)argp_parse(&k_store_argp, argc, argv, 0, NULL, &args);
    if (strcmp(args.action, "rm") == 0) {
        return remove_job(&args);
    }
    fv_status_t status = fv_store_each(args.dir, show_job, &look);
    if ((status == FV_OK) && (args.job != NULL) && (look.n_jobs == 0)) {
        status = fv_fail(FV_ERR_NOT_FOUND, "%s: no such job", args.job);
    }
    if (status != FV_OK) {
        (void)fprintf(stderr, "fovea: %s\n", fv_error_context());
        return FV_EXIT_SERVICE;
    }
    return ((strcmp(args.action, "check") == 0) && look.has_failed) ? FV_EXIT_SERVICE : FV_EXIT_OK;
}
