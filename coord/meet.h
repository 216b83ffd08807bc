/*
 * meet.h - ranks prove to each other's sockets that they belong to one job.
 *
 *   rank 0                                        rank r
 *     accept  ── fv_meet_challenge_t: a fresh nonce ──▶
 *             ◀── header, fv_ctl_hello_t with proof = HMAC-SHA256(secret, nonce, epoch, hello) ──
 *
 * The secret came over MPI and never goes over the socket, and a proof is good for one connection. Whoever else connects is
 * dropped, and keeps nobody waiting: all connections are read side by side.
 *
 * Thread: one. No MPI here.
 */
#ifndef FV_COORD_MEET_H
#define FV_COORD_MEET_H

#include "common/status.h"
#include "proto/control.h"

#define FV_MEET_NONCE_BYTES 16

typedef struct fv_meet_challenge {
    uint32_t magic; /* FV_CTL_MAGIC */
    uint32_t epoch;
    uint8_t nonce[FV_MEET_NONCE_BYTES];
} fv_meet_challenge_t;

/*
 * Accepts ranks at a listening stream socket, each with a connection for control and one for beats.
 * fds, beat_fds: [n_ranks], -1 for the ranks 1..n_ranks-1 that are awaited; hellos: [n_ranks]; proofs are wiped.
 * on_accept (may be NULL) sets a fresh connection's options.
 * Errors: FV_ERR_TIMED_OUT naming who is missing after timeout_ms; FV_ERR_SYSTEM.
 */
FV_MUST_CHECK fv_status_t fv_meet_accept(int listen_fd,
                                         const uint8_t secret[FV_SECRET_BYTES],
                                         uint32_t epoch,
                                         uint32_t n_ranks,
                                         uint32_t timeout_ms,
                                         void (*on_accept)(int fd),
                                         int *fds,
                                         int *beat_fds,
                                         fv_ctl_hello_t *hellos);

/* The other side, on a connected socket. Errors: FV_ERR_PROTOCOL for a challenge that is none; as common/frame.h. */
FV_MUST_CHECK fv_status_t fv_meet_introduce(int fd,
                                            const uint8_t secret[FV_SECRET_BYTES],
                                            uint32_t epoch,
                                            const fv_ctl_hello_t *hello,
                                            uint32_t timeout_ms);

#endif /* FV_COORD_MEET_H */
