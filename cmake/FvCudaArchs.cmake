# Refuses a list FV_CUDA_ARCHS of GPUs that the kernels would be wrong on. Also a script:
#     cmake "-DFV_CUDA_ARCHS=80-real;90a-real" -P cmake/FvCudaArchs.cmake
# Without the "a" of 90a the compiler has no wgmma, and kernels that are written with it have empty bodies, which nothing
# at run time tells from whole ones. OFF, alone: the caller's CMAKE_CUDA_FLAGS name the code (docs/gpu.md).
set(_fv_others ${FV_CUDA_ARCHS})
list(REMOVE_ITEM _fv_others 80-real 90a-real)
if(NOT "${FV_CUDA_ARCHS}" STREQUAL "OFF" AND (NOT "${_fv_others}" STREQUAL "" OR "${FV_CUDA_ARCHS}" STREQUAL ""))
    message(FATAL_ERROR "FV_CUDA_ARCHS: given \"${FV_CUDA_ARCHS}\", expected 90a-real, 80-real or \"80-real;90a-real\"")
endif()
