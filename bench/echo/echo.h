/*
 * echo.h - the bare gRPC echo: what gRPC's C core costs with nothing behind it.
 *
 * Request:  u64 reply_bytes, u64 id, then anything (little-endian; at least ECHO_HEAD_BYTES).
 * Reply:    the first reply_bytes of the request, sent by reference, padded with zeros when it was shorter.
 * The server is one thread and as tuned as the service's door.
 */
#ifndef FV_BENCH_ECHO_H
#define FV_BENCH_ECHO_H

#define ECHO_HEAD_BYTES  16U
#define ECHO_STREAM      "/echo.Echo/Stream"
#define ECHO_ONCE        "/echo.Echo/Once"
#define ECHO_REPLY_MAX   (64U << 20U)
#define ECHO_FRAME_BYTES 16777215

/* Serves until the process is killed; prints the bound address on stdout first. Returns an exit code. */
int fv_echo_serve(const char *address);

/* malloc keeps what it has: the same settings as the service's. Once, before any gRPC call. */
void fv_echo_tune_malloc(void);

#endif /* FV_BENCH_ECHO_H */
