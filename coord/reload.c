/*
 * reload.c - when a file that could not be read is tried again, and what of it is logged.
 */
#include "coord/reload.h"

#include "common/log.h"

#include <stdio.h>
#include <string.h>

bool fv_reload_is_due(const fv_reload_t *reload, int64_t now_us)
{
    return (reload->n_failed > 0U) && (now_us >= reload->due_us);
}

bool fv_reload_failed(fv_reload_t *reload, const char *what, bool is_new, int64_t now_us)
{
    int64_t wait_us = FV_RELOAD_FIRST_US;

    if (is_new) {
        *reload = (fv_reload_t){0};
    }
    for (uint32_t i = 0; (i < reload->n_failed) && (wait_us < FV_RELOAD_MAX_US); i++) {
        wait_us *= 2;
    }
    reload->n_failed++;
    reload->due_us = now_us + ((wait_us < FV_RELOAD_MAX_US) ? wait_us : FV_RELOAD_MAX_US);
    if (strcmp(reload->text, fv_error_context()) == 0) {
        return false;
    }
    (void)snprintf(reload->text, sizeof(reload->text), "%s", fv_error_context());
    fv_error("%s (tried again from time to time): %s", what, reload->text);
    return true;
}

void fv_reload_succeeded(fv_reload_t *reload)
{
    *reload = (fv_reload_t){0};
}
