/*
 * session_id.h - a session's name, the same for clients, coordinator, workers and what they keep.
 *
 * Slots are used again; an id never is. What outlives a process therefore says whose it is by id.
 */
#ifndef FV_PROTO_SESSION_ID_H
#define FV_PROTO_SESSION_ID_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef struct fv_session_id {
    uint8_t bytes[16]; /* random */
} fv_session_id_t;

static inline bool fv_session_id_is(const fv_session_id_t *a, const fv_session_id_t *b)
{
    return memcmp(a->bytes, b->bytes, sizeof(a->bytes)) == 0;
}

/*
 * Where the numbers of a session's records begin in a journal: so far from any other session's that the next record of one
 * is never taken for the next of another that had the same slot before it.
 */
static inline uint64_t fv_session_id_first_number(const fv_session_id_t *id)
{
    uint64_t half[2];

    memcpy(half, id->bytes, sizeof(half));
    return half[0] ^ (half[1] << 1U);
}

#endif /* FV_PROTO_SESSION_ID_H */
