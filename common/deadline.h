/*
 * deadline.h - the last resort against calls that block and can not be given up: past its time the process ends.
 *
 * MPI_Init, MPI_Finalize, collectives at start and the making of a communicator wait for ever for a rank that died. State is
 * outside the process or can be had again, so the process ends with a code that says why, and is started anew.
 *
 * One deadline a process at a time. Uses SIGALRM. Thread: main.
 */
#ifndef FV_COMMON_DEADLINE_H
#define FV_COMMON_DEADLINE_H

#include <stdint.h>

/* In `ms` the process says "`what`: not done in time" and leaves with `code`, unless it is disarmed. what: a literal. */
void fv_deadline_arm(uint32_t ms, int code, const char *what);
void fv_deadline_disarm(void);

#endif /* FV_COMMON_DEADLINE_H */
