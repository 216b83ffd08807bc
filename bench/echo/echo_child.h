/*
 * echo_child.h - the bare echo as a process of its own, and the workload that talks to it.
 */
#ifndef FV_BENCH_ECHO_CHILD_H
#define FV_BENCH_ECHO_CHILD_H

#include "bench/echo/load.h"

#include <sys/types.h>

typedef struct fv_echo_child {
    pid_t pid;
    char address[128];
} fv_echo_child_t;

/* Starts bench_echo (it lies beside this program) at `address`: "127.0.0.1:0" or "unix:/path". */
bool fv_echo_child_start(const char *address, fv_echo_child_t *out);
void fv_echo_child_stop(fv_echo_child_t *child);

/* Requests of request_bytes, replies of reply_bytes, both at least ECHO_HEAD_BYTES. */
typedef struct fv_echo_load {
    size_t request_bytes, reply_bytes;
    uint8_t *body; /* sent in place */
    uint64_t heads[LOAD_SLOTS_MAX][2];
} fv_echo_load_t;

bool fv_echo_load_init(fv_echo_load_t *load, size_t request_bytes, size_t reply_bytes);
void fv_echo_load_fini(fv_echo_load_t *load);
fv_workload_t fv_echo_workload(fv_echo_load_t *load);

#endif /* FV_BENCH_ECHO_CHILD_H */
