# Tests of the CUDA backend: label gpu, exit code 77 (skipped) where no GPU is visible.
if(FV_WITH_CUDA)
    fv_add_test(test_cuda_attend gpu SOURCES gpu/test_cuda_attend.c LIBS fv_attn_case fv_kernels TIMEOUT 300)
    fv_add_test(test_cuda_pages gpu SOURCES gpu/test_cuda_pages.c LIBS fv_attn_case fv_kernels TIMEOUT 300)
endif()
