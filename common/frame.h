/*
 * frame.h - whole messages on a stream socket: a fixed header, then a body of the size it names.
 *
 * Used on the control sockets between coordinator and workers (proto/control.h). The header's layout is the
 * caller's; frame.c only needs to know its size and where its body length comes from.
 *
 * Errors: FV_ERR_RANK_LOST when the peer closed (also in the middle of a message), FV_ERR_TIMED_OUT,
 * FV_ERR_PROTOCOL for a body longer than allowed, FV_ERR_SYSTEM.
 * Thread: one reader and one writer per socket. Sockets may be blocking or not.
 */
#ifndef FV_COMMON_FRAME_H
#define FV_COMMON_FRAME_H

#include "common/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One piece of what is sent. */
typedef struct fv_frame_piece {
    const void *data;
    size_t n_bytes;
} fv_frame_piece_t;

/* Sends the pieces one after the other, all of them or an error. timeout_ms < 0: no limit. At most 8 pieces. */
FV_MUST_CHECK fv_status_t fv_frame_send(int fd,
                                        const fv_frame_piece_t *pieces,
                                        size_t n_pieces,
                                        int timeout_ms);

/* Reads exactly n_bytes. timeout_ms < 0: no limit. */
FV_MUST_CHECK fv_status_t fv_frame_read(int fd, void *out, size_t n_bytes, int timeout_ms);

/* True when the peer has closed its end, unread data or not. Does not wait and reads nothing. */
bool fv_frame_is_closed(int fd);

#endif /* FV_COMMON_FRAME_H */
