/*
 * fault.h - the ten stations of a step, as places where a test may stop or kill the process.
 *
 * The hook is set by tests/support/fault_hook.c alone, which is linked into a fovead of its own (fovead_faulty); in every
 * other program a station costs one load and a branch.
 */
#ifndef FV_COMMON_FAULT_H
#define FV_COMMON_FAULT_H

#include <stddef.h>

/* Called with the station, 1..10, on the thread that is there. Set before any thread starts. */
typedef void (*fv_fault_hook_t)(int station);
extern fv_fault_hook_t fv_fault_hook;

static inline void fv_fault_point(int station)
{
    if (fv_fault_hook != NULL) {
        fv_fault_hook(station);
    }
}

#endif /* FV_COMMON_FAULT_H */
