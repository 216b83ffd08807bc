/*
 * main_local.h - a part of main.c: rank 0's own worker as the coordinator sees it (coord may not include worker).
 */
#ifndef FV_COORD_MAIN_LOCAL_H
#define FV_COORD_MAIN_LOCAL_H

#include "coord/local.h"
#include "coord/main_process.h"

/*
 * The table whose ctx is p->worker, for the engine's thread; NULL without one (dedicated coordinator). It lasts as long as
 * the process. Called once: the table of a CUDA rank is made in place.
 */
const fv_local_ops_t *fv_main_local_ops(const fv_process_t *p);

#endif /* FV_COORD_MAIN_LOCAL_H */
