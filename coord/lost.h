/*
 * lost.h - sessions that were lost, so that whoever asks for one is told so, and not that there is no such session.
 *
 * The newest FV_LOST_MAX are remembered. Thread: one.
 */
#ifndef FV_COORD_LOST_H
#define FV_COORD_LOST_H

#include "common/status.h"
#include "coord/session.h"

#include <stdint.h>

#define FV_LOST_MAX 65536U
#define FV_LOST_RECORDS \
    UINT32_MAX /* no rank: its records in the coordinator's journal are damaged */

typedef struct fv_lost fv_lost_t;

/* What became of a session. */
typedef struct fv_lost_session {
    fv_session_id_t id;
    const fv_principal_t *owner;
    uint32_t rank; /* with which it was lost; or FV_LOST_RECORDS */
} fv_lost_session_t;

FV_MUST_CHECK fv_status_t fv_lost_create(fv_lost_t **out);
void fv_lost_destroy(fv_lost_t *lost); /* NULL is fine */
void fv_lost_add(fv_lost_t *lost, const fv_lost_session_t *session);
/* NULL: not among them. O(FV_LOST_MAX): for the way of errors. */
const fv_lost_session_t *fv_lost_find(const fv_lost_t *lost, const fv_session_id_t *id);

#endif /* FV_COORD_LOST_H */
