/*
 * norm.h - the order in which the squares of a normalised latent are added (fv_append_item_t.norm_alpha). Private to kernels/.
 *
 * All backends keep it, so that they store the same bits: dims in groups of FV_NORM_DIMS go round FV_NORM_LANES sums, as
 * those of a warp's lanes, which are then added in pairs half of them apart. Each operation is rounded by itself.
 */
#ifndef FV_KERNELS_NORM_H
#define FV_KERNELS_NORM_H

#define FV_NORM_LANES 32U
#define FV_NORM_DIMS  4U

#endif /* FV_KERNELS_NORM_H */
