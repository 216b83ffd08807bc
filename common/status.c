/*
 * status.c - status texts and the per-thread error context.
 */
#include "common/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local char t_context[FV_ERROR_TEXT_BYTES];

const char *fv_status_str(fv_status_t status)
{
    switch (status) {
#define FV_STATUS_CASE(name, value, text) \
    case name:                            \
        return text;
        FV_STATUS_LIST(FV_STATUS_CASE)
#undef FV_STATUS_CASE
    }
    return "unknown status";
}

int fv_status_grpc(fv_status_t status)
{
    if (((int)status <= 0) && ((int)status >= -16)) {
        return -(int)status;
    }
    if ((status == FV_ERR_RANK_LOST) || (status == FV_ERR_TIMED_OUT)) {
        return 14; /* UNAVAILABLE: a retry is safe */
    }
    return 13; /* INTERNAL */
}

fv_status_t fv_fail(fv_status_t status, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    (void)vsnprintf(t_context, sizeof(t_context), fmt, ap);
    va_end(ap);
    return status;
}

const char *fv_error_context(void)
{
    return t_context;
}

fv_error_t fv_error_capture(fv_status_t status)
{
    fv_error_t error = {.status = (int)status, .text = ""};

    if (status != FV_OK) {
        memcpy(error.text, t_context, sizeof(error.text));
    }
    return error;
}

void fv_assert_failed(const char *file, int line, const char *expr)
{
    (void)fprintf(stderr, "fovea: assertion failed at %s:%d: %s\n", file, line, expr);
    abort();
}
