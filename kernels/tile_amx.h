/*
 * tile_amx.h - what tile_amx.c and tile_amx_softmax.c share.
 */
#ifndef FV_KERNELS_TILE_AMX_H
#define FV_KERNELS_TILE_AMX_H

#include "kernels/tile.h"

#define FV_AMX_ROWS 16 /* of a tile register */
/* Rows between two bf16 parts of Q or P: whole tiles are read. */
#define FV_AMX_PLANE_ROWS ((size_t)FV_BLOCK_ROWS_MAX + FV_AMX_ROWS)

/* The table's softmax; leaves the weights in block->p_planes, too. */
void fv_amx_softmax(fv_tile_block_t *block);

#endif /* FV_KERNELS_TILE_AMX_H */
