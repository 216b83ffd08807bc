# Tests of kernels/: tiles, the CPU backend, the null backend.
add_library(fv_attn_case STATIC support/attn_case.c support/attn_load.c)
fv_target_defaults(fv_attn_case)
target_link_libraries(fv_attn_case PUBLIC fv_kernels PRIVATE m)

foreach(_test test_policy test_tiles test_backend_cpu test_backend_merge test_backend_lean test_backend_latent test_backend_convert)
    fv_add_test(${_test} unit SOURCES unit/${_test}.c LIBS fv_attn_case fv_kernels m TIMEOUT 150)
endforeach()
fv_add_test(test_table_cache unit SOURCES unit/test_table_cache.c LIBS fv_kernels)
foreach(_test prop_attend prop_attend_split)
    fv_add_test(${_test} property SOURCES property/${_test}.c LIBS fv_attn_case fv_kernels m TIMEOUT 150)
endforeach()
