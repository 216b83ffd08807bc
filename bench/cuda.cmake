# The GPU benchmark of the lean kernel (FV_WITH_CUDA).
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
add_library(fv_cuda_peak STATIC cuda_peak.cu)
target_include_directories(fv_cuda_peak PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_features(fv_cuda_peak PRIVATE cuda_std_17)
set_target_properties(fv_cuda_peak PROPERTIES CUDA_ARCHITECTURES 90a-real CUDA_EXTENSIONS OFF)

add_executable(bench_kernels_cuda bench_kernels_cuda.c ../tests/support/attn_case.c ../tests/support/attn_load.c)
set_target_properties(bench_kernels_cuda PROPERTIES CUDA_ARCHITECTURES 90a-real)
target_include_directories(bench_kernels_cuda PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_definitions(bench_kernels_cuda PRIVATE _DEFAULT_SOURCE)
target_link_libraries(bench_kernels_cuda PRIVATE fv_cuda_peak fv_kernels CUDA::cudart_static m)
fv_target_defaults(bench_kernels_cuda)

add_executable(bench_s2_cuda bench_s2_cuda.c s2_cuda_case.c s2_cuda_time.c ../tests/support/attn_case.c ../tests/support/attn_load.c)
target_include_directories(bench_s2_cuda PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_definitions(bench_s2_cuda PRIVATE _DEFAULT_SOURCE)
target_link_libraries(bench_s2_cuda PRIVATE fv_cuda_peak fv_kernels CUDA::cudart_static m)
fv_target_defaults(bench_s2_cuda)

add_executable(bench_prefill_cuda bench_prefill_cuda.c ../tests/support/attn_case.c ../tests/support/attn_load.c)
set_target_properties(bench_prefill_cuda PROPERTIES CUDA_ARCHITECTURES 90a-real)
target_include_directories(bench_prefill_cuda PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_definitions(bench_prefill_cuda PRIVATE _DEFAULT_SOURCE)
target_link_libraries(bench_prefill_cuda PRIVATE fv_cuda_peak fv_kernels CUDA::cudart_static m)
fv_target_defaults(bench_prefill_cuda)

add_executable(bench_latent_cuda bench_latent_cuda.c ../tests/support/attn_case.c ../tests/support/attn_load.c)
set_target_properties(bench_latent_cuda PROPERTIES CUDA_ARCHITECTURES 90a-real)
target_include_directories(bench_latent_cuda PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_definitions(bench_latent_cuda PRIVATE _DEFAULT_SOURCE)
target_link_libraries(bench_latent_cuda PRIVATE fv_cuda_peak fv_kernels CUDA::cudart_static m)
fv_target_defaults(bench_latent_cuda)

if(TARGET fv_worker_cuda) # with NCCL
    add_executable(bench_exchange_nccl bench_exchange_nccl.c)
    target_include_directories(bench_exchange_nccl PRIVATE ${PROJECT_SOURCE_DIR})
    target_compile_definitions(bench_exchange_nccl PRIVATE _DEFAULT_SOURCE)
    target_link_libraries(bench_exchange_nccl PRIVATE fv_worker CUDA::cudart_static MPI::MPI_C m)
    fv_target_defaults(bench_exchange_nccl)
endif()

# The step of one rank on the GPU, without gRPC.
add_executable(bench_step_cuda bench_step_cuda.c)
target_include_directories(bench_step_cuda PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_definitions(bench_step_cuda PRIVATE _DEFAULT_SOURCE)
target_link_libraries(bench_step_cuda PRIVATE fv_worker fv_kernels CUDA::cudart_static)
fv_target_defaults(bench_step_cuda)
