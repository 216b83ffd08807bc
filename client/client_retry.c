/*
 * client_retry.c - a unary call again, when the service was not there.
 */
#include "client/client_internal.h"
#include "common/clock.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FIRST_PAUSE_US 20000
#define MAX_PAUSE_US   500000

static void nap(int64_t us)
{
    const struct timespec t = {.tv_sec = (time_t)(us / 1000000),
                               .tv_nsec = (long)(us % 1000000) * 1000};

    (void)nanosleep(&t, NULL);
}

/* Between half of it and all, so that clients do not come back all at once. */
static int64_t scattered(int64_t us, const void *client)
{
    uint64_t x = (uint64_t)fv_clock_us() ^ (uint64_t)(uintptr_t)client;

    x = (x ^ (x >> 31U)) * 0x9e3779b97f4a7c15U;
    return us / 2 + (int64_t)((x >> 33U) % (uint64_t)(us / 2));
}

/*
 * gRPC's words where a call found no connection: nothing was sent. Other words, of another gRPC perhaps, mean that it may have
 * been, which is the safe mistake.
 */
static bool is_unsent(const fovea_error_t *error)
{
    return strstr(error->message, "failed to connect to all addresses") == error->message;
}

fovea_code_t fv_client_unary(const fovea_client_t *client,
                             const fv_unary_call_t *unary,
                             uint32_t *out_n_tries,
                             fovea_error_t *error)
{
    int64_t end_us = fv_clock_us() + (int64_t)client->retry_ms * 1000;
    int64_t pause_us = FIRST_PAUSE_US;
    uint32_t n_tries = 0;
    fovea_error_t own;

    error = (error == NULL) ? &own : error;
    if (end_us > unary->deadline_us) {
        end_us = unary->deadline_us;
    }
    for (;;) {
        fovea_code_t code = fv_channel_unary(client->channel, unary, error);
        n_tries++;
        if (out_n_tries != NULL) {
            *out_n_tries = n_tries;
        }
        if ((code != FOVEA_UNAVAILABLE) || (unary->is_once && !is_unsent(error)) ||
            (fv_clock_us() + pause_us >= end_us)) {
            return code;
        }
        nap(scattered(pause_us, client));
        (void)fv_channel_wait_ready(client->channel, end_us);
        pause_us = (2 * pause_us < MAX_PAUSE_US) ? (2 * pause_us) : MAX_PAUSE_US;
    }
}
