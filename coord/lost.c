/*
 * lost.c - a ring of session ids.
 */
#include "coord/lost.h"

#include <stdlib.h>
#include <string.h>

struct fv_lost {
    uint64_t n_added;
    uint32_t cap;
    fv_lost_session_t *sessions; /* [cap], the next at n_added % FV_LOST_MAX */
};

fv_status_t fv_lost_create(fv_lost_t **out)
{
    fv_lost_t *lost = calloc(1, sizeof(*lost));

    if (lost == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "lost sessions");
    }
    *out = lost;
    return FV_OK;
}

void fv_lost_destroy(fv_lost_t *lost)
{
    if (lost != NULL) {
        free(lost->sessions);
        free(lost);
    }
}

/* Memory is taken when something is lost, which is hardly ever. Without any a session is forgotten: it is not found. */
static bool has_room(fv_lost_t *lost)
{
    if ((lost->n_added < lost->cap) || (lost->cap == FV_LOST_MAX)) {
        return true;
    }
    uint32_t cap = (lost->cap == 0U) ? 256U : (2U * lost->cap);
    fv_lost_session_t *sessions = realloc(lost->sessions, cap * sizeof(*sessions));
    if (sessions == NULL) {
        return false;
    }
    lost->sessions = sessions;
    lost->cap = cap;
    return true;
}

void fv_lost_add(fv_lost_t *lost, const fv_lost_session_t *session)
{
    if (has_room(lost)) {
        lost->sessions[lost->n_added % FV_LOST_MAX] = *session;
        lost->n_added++;
    }
}

const fv_lost_session_t *fv_lost_find(const fv_lost_t *lost, const fv_session_id_t *id)
{
    uint64_t n = (lost->n_added < FV_LOST_MAX) ? lost->n_added : FV_LOST_MAX;

    for (uint64_t i = 0; i < n; i++) {
        if (memcmp(&lost->sessions[i].id, id, sizeof(*id)) == 0) {
            return &lost->sessions[i];
        }
    }
    return NULL;
}
