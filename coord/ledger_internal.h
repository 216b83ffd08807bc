/*
 * ledger_internal.h - the ledger's state, shared by ledger.c (writes) and ledger_load.c (reads).
 */
#ifndef FV_COORD_LEDGER_INTERNAL_H
#define FV_COORD_LEDGER_INTERNAL_H

#include "common/disklog.h"
#include "common/journal.h"
#include "coord/ledger.h"
#include "proto/ledger.h"

struct fv_ledger {
    fv_store_place_t place;
    fv_journal_t *journal;
    fv_disklog_t *disk; /* level host: has all of it, too; NULL: none */
    uint64_t rewritten_bytes;
    uint32_t n_open; /* sessions: each can be closed, even if the file system is full */
    bool is_new;     /* nothing was in it when it was opened */
    bool is_undone;  /* the disk lacks something until it is written anew */
};

_Static_assert(FV_PLAN_REASON_BYTES == FV_LEDGER_REASON_BYTES, "a session's reason fits");
_Static_assert(FV_TOKEN_NAME_BYTES == FV_LEDGER_OWNER_BYTES, "an owner's name fits");
_Static_assert(sizeof(fv_append_record_t) == 16, "written as it is");

#endif /* FV_COORD_LEDGER_INTERNAL_H */
