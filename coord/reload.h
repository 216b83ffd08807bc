/*
 * reload.h - a file that could not be read again is tried again, at growing distances, though it does not seem to change.
 *
 * What failed may have been no fault of the file (no descriptor or memory was left), and a file that is just being written may have
 * its last size and time already. Whoever asks for the file drives the retries: one that nobody asks for need not be new.
 */
#ifndef FV_COORD_RELOAD_H
#define FV_COORD_RELOAD_H

#include "common/status.h"

#include <stdbool.h>
#include <stdint.h>

#define FV_RELOAD_FIRST_US 1000000
#define FV_RELOAD_MAX_US   60000000

/* All zero: nothing has failed. Guarded by its owner's lock. */
typedef struct fv_reload {
    uint32_t n_failed; /* in a row */
    int64_t due_us;
    char text[FV_ERROR_TEXT_BYTES]; /* of the last failure that was logged */
} fv_reload_t;

/* Whether the last attempt failed and the next is due. */
bool fv_reload_is_due(const fv_reload_t *reload, int64_t now_us);
/*
 * An attempt failed; fv_error_context() says why. is_new: the file has changed, or somebody asked for it, so that the waits begin anew.
 * True when it was logged, as an error that begins with `what`: a new failure, or one that says something else than the last.
 */
bool fv_reload_failed(fv_reload_t *reload, const char *what, bool is_new, int64_t now_us);
void fv_reload_succeeded(fv_reload_t *reload);

#endif /* FV_COORD_RELOAD_H */
