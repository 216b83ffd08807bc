/*
 * client_attend.h - an attend request as a message, and its answer into the caller's memory.
 */
#ifndef FV_CLIENT_CLIENT_ATTEND_H
#define FV_CLIENT_CLIENT_ATTEND_H

#include "client/client_internal.h"

#define FV_ATTEND_PIECES 7 /* head, then a head and a tensor for each of q, k and v */

/* An encoded request: small fields owned, tensors borrowed from the caller. */
typedef struct fv_attend_message {
    fv_bytes_t head;
    fv_wire_tensor_heads_t tensor_heads;
    fv_out_piece_t pieces[FV_ATTEND_PIECES];
    size_t n_pieces;
} fv_attend_message_t;

/* Where the answer goes. */
typedef struct fv_attend_target {
    void *out;
    size_t out_bytes;
    float *lse;
    size_t lse_bytes;
} fv_attend_target_t;

/*
 * Encodes `request` under `request_id`; the tensors will be counted by *pins while they are being sent.
 * `out` must not move afterwards: its pieces point into it. Errors: INVALID_ARGUMENT.
 */
fovea_code_t fv_attend_message_init(fv_attend_message_t *out,
                                    const fovea_attend_request_t *request,
                                    uint64_t request_id,
                                    atomic_uint *pins,
                                    fovea_error_t *error);
void fv_attend_message_fini(fv_attend_message_t *message);

static inline fv_attend_target_t fv_attend_target(const fovea_attend_request_t *request)
{
    return (fv_attend_target_t){request->out, request->out_bytes, request->lse,
                                (request->lse == NULL) ? 0 : request->lse_bytes};
}

/* Which request an answer belongs to, and the rest of it but the tensors. */
fovea_code_t fv_attend_reply_scan(const fv_span_t *spans,
                                  size_t n_spans,
                                  fv_attend_response_view_t *out,
                                  fovea_error_t *error);

/* Copies the tensors of a scanned answer to `target`; returns the answer's own code when it failed. */
fovea_code_t fv_attend_reply_gather(const fv_span_t *spans,
                                    size_t n_spans,
                                    const fv_attend_response_view_t *view,
                                    const fv_attend_target_t *target,
                                    fovea_timings_t *out_timings,
                                    fovea_error_t *error);

#endif /* FV_CLIENT_CLIENT_ATTEND_H */
