/*
 * ledger_files.c - the coordinator's journal, in memory and on a disk: opened, and given back.
 */
#include "common/log.h"
#include "coord/ledger_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static fv_status_t set_aside(const char *path, const char *what)
{
    char aside[FV_STORE_PATH_BYTES + 16];

    (void)snprintf(aside, sizeof(aside), "%s.damaged", path);
    fv_error("durability: %s: %s; it is kept as %s", fv_error_context(), what, aside);
    return (rename(path, aside) == 0) ? FV_OK
                                      : fv_fail(FV_ERR_SYSTEM, "%s: cannot be renamed", path);
}

static fv_status_t open_disk(fv_ledger_t *ledger, const fv_journal_head_t *head, bool *out_is_new)
{
    const fv_store_place_t *place = &ledger->place;
    char path[FV_STORE_PATH_BYTES];

    *out_is_new = true;
    if (place->disk_dir[0] == '\0') {
        return FV_OK;
    }
    fv_store_path(place, FV_STORE_COORDINATOR_LOG, path);
    fv_status_t status = fv_disklog_open(path, head, place->wait_ms, &ledger->disk, out_is_new);
    if (status != FV_ERR_DATA_LOSS) {
        return status;
    }
    FV_RETURN_IF_ERR(set_aside(path, "what only the disk has is lost"));
    return fv_disklog_open(path, head, place->wait_ms, &ledger->disk, out_is_new);
}

static fv_status_t open_journal(fv_ledger_t *ledger, const fv_journal_head_t *head, bool *is_new)
{
    const fv_store_place_t *place = &ledger->place;
    char path[FV_STORE_PATH_BYTES];

    fv_store_path(place, FV_STORE_COORDINATOR, path);
    fv_status_t status = fv_journal_open(path, head, place->wait_ms, &ledger->journal, is_new);
    if (status != FV_ERR_DATA_LOSS) {
        return status;
    }
    FV_RETURN_IF_ERR(set_aside(path, (ledger->disk == NULL) ? "all sessions are lost"
                                                            : "its disk may have the sessions"));
    return fv_journal_open(path, head, place->wait_ms, &ledger->journal, is_new);
}

static fv_status_t on_table(void *arg, const void *records, size_t n_bytes)
{
    fv_ledger_t *ledger = arg;

    FV_RETURN_IF_ERR(fv_journal_reserve(ledger->journal, n_bytes));
    fv_journal_add_raw(ledger->journal, records, n_bytes);
    return FV_OK;
}

/* After the host was down: from the disk. */
static fv_status_t restore(fv_ledger_t *ledger)
{
    const fv_disklog_reader_t reader = {.table = on_table, .arg = ledger};
    fv_journal_report_t report = {0};

    fv_journal_set_disk(ledger->journal, NULL, FV_JOURNAL_UNSETTLED);
    FV_RETURN_IF_ERR(fv_journal_rewrite_begin(ledger->journal));
    fv_status_t status = fv_disklog_read(ledger->disk, &reader, &report);
    if (status == FV_OK) {
        status = fv_journal_rewrite_end(ledger->journal);
    }
    if (status != FV_OK) {
        fv_journal_rewrite_abort(ledger->journal);
        return status;
    }
    fv_info("durability: the coordinator's journal is read from its disk: %llu records",
            (unsigned long long)report.n_records);
    return FV_OK;
}

static fv_status_t open_files(fv_ledger_t *ledger, const fv_store_place_t *place)
{
    bool is_new = false;
    bool is_new_log = true;
    fv_journal_head_t head = {.kind = "coordinator", .n_slots = place->n_slots};

    memcpy(head.job, place->job, sizeof(head.job));
    FV_RETURN_IF_ERR(fv_store_prepare(place));
    FV_RETURN_IF_ERR(open_disk(ledger, &head, &is_new_log));
    head.disk_id = (ledger->disk == NULL) ? 0U : fv_disklog_id(ledger->disk);
    FV_RETURN_IF_ERR(open_journal(ledger, &head, &is_new));
    if (ledger->disk == NULL) {
        return FV_OK;
    }
    if (is_new && !is_new_log) {
        FV_RETURN_IF_ERR(restore(ledger));
    } else if (!is_new) {
        ledger->is_undone =
            fv_journal_head(ledger->journal)->disk_id != fv_disklog_id(ledger->disk);
    }
    ledger->is_undone = ledger->is_undone || fv_disklog_wants_fresh(ledger->disk);
    fv_journal_set_disk(ledger->journal, ledger->disk, fv_disklog_id(ledger->disk));
    return FV_OK;
}

fv_status_t fv_ledger_open(const fv_store_place_t *place, fv_ledger_t **out)
{
    fv_ledger_t *ledger = calloc(1, sizeof(*ledger));

    if (ledger == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "ledger");
    }
    ledger->place = *place;
    fv_status_t status = open_files(ledger, place);
    ledger->is_new = (status == FV_OK) && (fv_journal_bytes(ledger->journal) == 0U);
    if (status != FV_OK) {
        fv_ledger_close(ledger);
        return status;
    }
    *out = ledger;
    return FV_OK;
}

int32_t fv_ledger_durability(const fv_ledger_t *ledger)
{
    return (ledger == NULL) ? 0 : ((ledger->disk == NULL) ? 1 : 2);
}

void fv_ledger_close(fv_ledger_t *ledger)
{
    if (ledger != NULL) {
        fv_journal_close(ledger->journal);
        fv_disklog_close(ledger->disk);
        free(ledger);
    }
}

void fv_ledger_remove(fv_ledger_t *ledger)
{
    if (ledger != NULL) {
        fv_disklog_remove(ledger->disk);
        fv_journal_remove(ledger->journal);
        fv_store_clear(&ledger->place);
        fv_store_leave(&ledger->place);
        free(ledger);
    }
}

bool fv_ledger_is_undone(const fv_ledger_t *ledger)
{
    return ledger->is_undone;
}

bool fv_ledger_is_new(const fv_ledger_t *ledger)
{
    return (ledger != NULL) && ledger->is_new;
}
