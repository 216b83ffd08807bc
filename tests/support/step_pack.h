/*
 * step_pack.h - what a coordinator does with tensors, for tests of the worker: cut out a rank's share of an
 * item, put a rank's results back. Written from proto/step.h alone.
 */
#ifndef FV_TESTS_SUPPORT_STEP_PACK_H
#define FV_TESTS_SUPPORT_STEP_PACK_H

#include "proto/step.h"

/* Writes the packed input of `rank`; `full` has the whole item's tensors. Returns the bytes written, padded. */
size_t fv_pack_input(const fv_model_spec_t *spec,
                     const fv_placement_t *placement,
                     const fv_ctl_item_t *item,
                     uint32_t rank,
                     const fv_step_io_t *full,
                     uint8_t *in);

/* Copies the packed output of `rank` to its places in full->out and full->lse. Returns the bytes read, padded. */
size_t fv_unpack_output(const fv_model_spec_t *spec,
                        const fv_placement_t *placement,
                        const fv_ctl_item_t *item,
                        uint32_t rank,
                        const uint8_t *out,
                        const fv_step_io_t *full);

#endif /* FV_TESTS_SUPPORT_STEP_PACK_H */
