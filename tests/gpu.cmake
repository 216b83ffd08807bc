# Tests of the CUDA backend: label gpu, exit code 77 (skipped) where no GPU is visible.
if(FV_WITH_CUDA)
    find_package(CUDAToolkit REQUIRED)
    fv_add_test(test_cuda_attend gpu SOURCES gpu/test_cuda_attend.c LIBS fv_attn_case fv_kernels CUDA::cudart_static
                TIMEOUT 300)
    fv_add_test(test_cuda_fit gpu SOURCES gpu/test_cuda_fit.c LIBS fv_attn_case fv_kernels CUDA::cudart_static TIMEOUT 60)
    fv_add_test(test_cuda_prefill gpu SOURCES gpu/test_cuda_prefill.c LIBS fv_attn_case fv_kernels CUDA::cudart_static
                TIMEOUT 300)
    fv_add_test(test_cuda_latent gpu SOURCES gpu/test_cuda_latent.c LIBS fv_attn_case fv_kernels CUDA::cudart_static
                TIMEOUT 300)
    fv_add_test(test_cuda_latent_fp8 gpu SOURCES gpu/test_cuda_latent_fp8.c
                LIBS fv_attn_case fv_kernels CUDA::cudart_static m TIMEOUT 120)
    fv_add_test(test_cuda_pages gpu SOURCES gpu/test_cuda_pages.c LIBS fv_attn_case fv_kernels TIMEOUT 300)
    fv_add_test(test_cuda_tables gpu SOURCES gpu/test_cuda_tables.c LIBS fv_attn_case fv_kernels CUDA::cudart_static
                TIMEOUT 120)
    foreach(_test test_cuda_kernels test_cuda_cancel)
        fv_add_test(${_test} gpu SOURCES gpu/${_test}.c LIBS fv_attn_case fv_kernels CUDA::cudart_static TIMEOUT 120)
    endforeach()
    fv_add_test(test_cuda_s2 gpu SOURCES gpu/test_cuda_s2.c LIBS fv_attn_case fv_kernels CUDA::cudart_static
                TIMEOUT 120)
    fv_add_test(test_cuda_split gpu SOURCES property/prop_attend_split.c LIBS fv_attn_case fv_kernels m TIMEOUT 120)
    target_compile_definitions(test_cuda_split PRIVATE FV_PROP_CUDA)
    fv_add_test(test_cuda_ahead gpu SOURCES gpu/test_cuda_ahead.c LIBS fv_attn_case fv_kernels CUDA::cudart_static
                TIMEOUT 60)
endif()
if(FV_WITH_CUDA AND TARGET fv_worker_cuda) # several GPUs, with NCCL
    find_package(CUDAToolkit REQUIRED)
    file(GLOB _gpu_rig CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/support/worker_rig*.c)
    fv_add_test(test_exchange_cuda gpu
                SOURCES gpu/test_exchange_cuda.c ${_gpu_rig} support/step_pack.c support/local_exchange.c
                LIBS fv_worker CUDA::cudart_static Threads::Threads m TIMEOUT 300)
    add_test(NAME test_gpu_ranks COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/deploy/test_gpu_ranks.sh $<TARGET_FILE:fovead>
             $<TARGET_FILE:fovea_cli>)
    set_tests_properties(test_gpu_ranks PROPERTIES LABELS gpu TIMEOUT 180 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu)
endif()
