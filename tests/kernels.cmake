# Tests of kernels/: tiles, the CPU backend, the null backend.
add_library(fv_attn_case STATIC support/attn_case.c support/attn_load.c)
fv_target_defaults(fv_attn_case)
target_link_libraries(fv_attn_case PUBLIC fv_kernels PRIVATE m)

fv_add_test(test_tiles unit SOURCES unit/test_tiles.c LIBS fv_attn_case fv_kernels)
fv_add_test(prop_attend property SOURCES property/prop_attend.c LIBS fv_attn_case fv_kernels TIMEOUT 60)
