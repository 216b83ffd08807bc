/*
 * store_life.h - a worker with a store, and a few sessions whose life is the same each time: for tests of what comes back.
 */
#ifndef FV_TESTS_SUPPORT_STORE_LIFE_H
#define FV_TESTS_SUPPORT_STORE_LIFE_H

#include "worker/worker.h"

#define FV_LIFE_DIM      16
#define FV_LIFE_HEADS    2
#define FV_LIFE_LAYERS   2
#define FV_LIFE_SESSIONS 3U
#define FV_LIFE_ARENA    ((size_t)1 << 20)

extern fv_store_place_t fv_life_place;
extern fv_backend_ops_t fv_life_ops; /* to be set by each test */
/* Of sessions 0, 1 (a fork of it that went on alone), 2 (was cut), and one that was closed. */
extern const uint64_t fv_life_lengths[FV_LIFE_SESSIONS + 1U][FV_LIFE_LAYERS];

int fv_life_make_folder(void **state);
int fv_life_remove_folder(void **state);
fv_ctl_model_t fv_life_model(void);
fv_worker_t *fv_life_worker(void);
fv_status_t fv_life_try_run(fv_worker_t *worker,
                            uint32_t slot,
                            uint32_t layer,
                            uint64_t position,
                            uint32_t n,
                            bool is_append,
                            float *out);
void fv_life_run(fv_worker_t *worker,
                 uint32_t slot,
                 uint32_t layer,
                 uint64_t position,
                 uint32_t n,
                 bool is_append,
                 float *out);
fv_session_id_t fv_life_id(uint32_t number);
fv_ctl_open_t fv_life_open(uint32_t slot);
void fv_life_play(fv_worker_t *worker);
void fv_life_query(fv_worker_t *worker,
                   uint32_t slot,
                   float out[FV_LIFE_LAYERS][FV_LIFE_HEADS * FV_LIFE_DIM]);
fv_status_t fv_life_keep_as(fv_worker_t *worker,
                            uint32_t slot,
                            fv_session_id_t id,
                            const uint64_t lengths[FV_LIFE_LAYERS]);
fv_status_t
fv_life_keep_lengths(fv_worker_t *worker, uint32_t slot, const uint64_t lengths[FV_LIFE_LAYERS]);
fv_status_t fv_life_keep(fv_worker_t *worker, uint32_t slot, uint64_t missing);

#endif /* FV_TESTS_SUPPORT_STORE_LIFE_H */
