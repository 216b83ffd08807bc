/*
 * ledger.h - the coordinator's journal: models, sessions and what was acknowledged of them, so that they outlive it.
 *
 * What is created is noted when all ranks have it, what is taken away before any rank is told: after a death the ranks have
 * at least what the ledger says, and are cut to it (FV_CTL_KEEP). An append is noted when every rank has committed it, and
 * answered after that: so nothing that was acknowledged is missing here.
 *
 * Thread: the engine's turn. A NULL ledger notes nothing.
 */
#ifndef FV_COORD_LEDGER_H
#define FV_COORD_LEDGER_H

#include "common/status.h"
#include "common/store.h"
#include "coord/lost.h"
#include "coord/sched.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct fv_ledger fv_ledger_t;

/* What it survives, as in attention.proto: 0 nothing (NULL), 1 the service's processes, 2 its hosts. */
int32_t fv_ledger_durability(const fv_ledger_t *ledger);

/* Errors: as fv_journal_open(). A damaged head: the file is set aside (.damaged), and nothing is known. */
FV_MUST_CHECK fv_status_t fv_ledger_open(const fv_store_place_t *place, fv_ledger_t **out);
bool fv_ledger_is_new(
    const fv_ledger_t *ledger);             /* nothing was in it when it was opened; NULL: false */
void fv_ledger_close(fv_ledger_t *ledger);  /* NULL is fine */
void fv_ledger_remove(fv_ledger_t *ledger); /* and its file goes */

/*
 * Plays what is there into an empty core. owner(arg, name) gives the principal of a name. Sessions whose records are damaged
 * are left out, said so, and added to `lost` - unless nothing says any more whose they were. *out_has_holes: of some records nobody knows whose they were.
 */
FV_MUST_CHECK fv_status_t fv_ledger_load(fv_ledger_t *ledger,
                                         fv_sched_t *sched,
                                         fv_principal_t *(*owner)(void *arg, const char *name),
                                         void *arg,
                                         fv_lost_t *lost,
                                         bool *out_has_holes);

/* A model of the core, with its owner. */
FV_MUST_CHECK fv_status_t fv_ledger_note_model(fv_ledger_t *ledger,
                                               const fv_sched_t *sched,
                                               uint32_t slot);
/* parent NULL: opened, not forked. */
FV_MUST_CHECK fv_status_t fv_ledger_note_session(fv_ledger_t *ledger,
                                                 fv_session_t *session,
                                                 const fv_session_t *parent,
                                                 uint64_t at_position);
FV_MUST_CHECK fv_status_t fv_ledger_note_truncate(fv_ledger_t *ledger,
                                                  fv_session_t *session,
                                                  uint64_t position);
FV_MUST_CHECK fv_status_t fv_ledger_note_close(fv_ledger_t *ledger, const fv_session_t *session);

/* Room for a model or a truncate: noting one can not fail for want of it. Errors: FV_ERR_EXHAUSTED. */
FV_MUST_CHECK fv_status_t fv_ledger_reserve_command(fv_ledger_t *ledger);
/* Room for the appends of all steps that may be under way: fv_ledger_note_step() can not fail for want of it. */
FV_MUST_CHECK fv_status_t fv_ledger_reserve(fv_ledger_t *ledger);
/* The appends of a step that ran: before they are committed in the core, and before anybody is answered. */
FV_MUST_CHECK fv_status_t fv_ledger_note_step(fv_ledger_t *ledger, const fv_step_plan_t *plan);

/* Now and then, when nothing is noted: writes the journal anew when it has grown much. */
void fv_ledger_tidy(fv_ledger_t *ledger, const fv_sched_t *sched);
/* Writes it anew. */
bool fv_ledger_is_undone(
    const fv_ledger_t *ledger); /* its disk lacks something until it was written anew */
FV_MUST_CHECK fv_status_t fv_ledger_rewrite(fv_ledger_t *ledger, const fv_sched_t *sched);

#endif /* FV_COORD_LEDGER_H */
