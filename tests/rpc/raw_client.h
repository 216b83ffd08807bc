/*
 * raw_client.h - a blocking gRPC client for tests, straight on C core: every step of a call is the test's own.
 *
 * One thread uses a client. Whatever waits, waits at most RAW_WAIT_MS and then fails the test's assertion.
 */
#ifndef FV_TESTS_RPC_RAW_CLIENT_H
#define FV_TESTS_RPC_RAW_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RAW_WAIT_MS 20000

typedef struct fv_raw_client fv_raw_client_t;
typedef struct fv_raw_call fv_raw_call_t;

/* `target`: as fv_rpc_address() gives it. */
fv_raw_client_t *fv_raw_open(const char *target);
/* After its calls were freed. */
void fv_raw_close(fv_raw_client_t *client);

/* timeout_ms 0 = none. */
fv_raw_call_t *fv_raw_start(fv_raw_client_t *client, const char *method, uint32_t timeout_ms);
void fv_raw_free(fv_raw_call_t *call); /* cancels what is under way */

/* Starts sending and does not wait; wait with fv_raw_sent(). One at a time. */
void fv_raw_send(fv_raw_call_t *call, const void *data, size_t n_bytes);
/* True when the send was accepted by flow control within wait_ms; false: it still waits, or it failed. */
bool fv_raw_sent(fv_raw_call_t *call, uint32_t wait_ms);
void fv_raw_half_close(fv_raw_call_t *call);
/* The next message, malloc'ed; NULL at the end of the stream. */
uint8_t *fv_raw_receive(fv_raw_call_t *call, size_t *out_bytes);
void fv_raw_cancel(fv_raw_call_t *call);
/* The gRPC status code; `out_text` (256 bytes) may be NULL. */
int fv_raw_status(fv_raw_call_t *call, char *out_text);

/* A whole unary call: status, and the reply when `out_reply` is not NULL (malloc'ed, NULL on failure). */
int fv_raw_unary(fv_raw_client_t *client,
                 const char *method,
                 const void *data,
                 size_t n_bytes,
                 uint8_t **out_reply,
                 size_t *out_bytes);

#endif /* FV_TESTS_RPC_RAW_CLIENT_H */
