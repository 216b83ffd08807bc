# The CUDA backend joins fv_kernels. Device code is a library of its own: nvcc takes other flags than gcc.
include(FvCudaArchs)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(fv_kernels_cuda STATIC lean_bf16.cu lean_f16.cu lean_f32_wide.cu lean_f16_wide.cu lean_cuda.cu
                                   prefill_bf16.cu prefill_f16.cu prefill_cuda.cu latent_cuda.cu latent_any.cu
                                   page_cuda.cu pull_cuda.cu merge_cuda.cu)
target_include_directories(fv_kernels_cuda PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_features(fv_kernels_cuda PRIVATE cuda_std_17)
set_target_properties(fv_kernels fv_kernels_cuda PROPERTIES CUDA_ARCHITECTURES "${FV_CUDA_ARCHS}" CUDA_EXTENSIONS OFF)
# (missing-launch-bounds is left out: nvcc 13.0 reports templates that have them.)
# -Wshadow=local: headers shared with C name a function and its result type alike, which -Wshadow calls hiding.
target_compile_options(fv_kernels_cuda PRIVATE
    -lineinfo
    "SHELL:--Werror default-stream-launch,cross-execution-space-call"
    "SHELL:-Xcompiler -Wall,-Wextra,-Wshadow=local,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics")
if(FV_WERROR)
    target_compile_options(fv_kernels_cuda PRIVATE "SHELL:-Werror all-warnings")
endif()

# What differs on sm_80, compiled and assembled for it: one kind of lean kernel stands for all. Built by name only.
add_library(fv_kernels_sm80 OBJECT EXCLUDE_FROM_ALL lean_bf16.cu prefill_bf16.cu latent_cuda.cu latent_any.cu
                                                    pull_cuda.cu merge_cuda.cu)
target_include_directories(fv_kernels_sm80 PRIVATE ${PROJECT_SOURCE_DIR})
target_compile_features(fv_kernels_sm80 PRIVATE cuda_std_17)
set_target_properties(fv_kernels_sm80 PROPERTIES CUDA_ARCHITECTURES 80-real CUDA_EXTENSIONS OFF)
target_compile_options(fv_kernels_sm80 PRIVATE "SHELL:-Xptxas -O1")
if(FV_WERROR)
    target_compile_options(fv_kernels_sm80 PRIVATE "SHELL:-Werror all-warnings")
endif()

target_sources(fv_kernels PRIVATE backend_cuda.c staging_cuda.c send_cuda.c wait_cuda.c ahead_cuda.c append_cuda.c
                                  attend_cuda.c stage_cuda.c lean_plan_cuda.c lean_late_cuda.c
                                  prefill_plan_cuda.c merge_cuda.c)
target_compile_definitions(fv_kernels PUBLIC FV_WITH_CUDA)
list(JOIN FV_CUDA_ARCHS "," _fv_archs)
set_source_files_properties(backend_cuda.c PROPERTIES COMPILE_DEFINITIONS "FV_CUDA_ARCHS=\"${_fv_archs}\"")
target_link_libraries(fv_kernels PRIVATE fv_kernels_cuda CUDA::cudart_static)
