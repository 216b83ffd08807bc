# Tests of worker/.
set(_rig support/worker_rig.c support/worker_rig_step.c support/worker_rig_latent.c support/worker_rig_life.c support/step_pack.c
         support/local_exchange.c support/local_windows.c)
fv_add_test(test_kv_pool unit SOURCES unit/test_kv_pool.c LIBS fv_worker)
fv_add_test(test_exchange_regions unit SOURCES unit/test_exchange_regions.c LIBS fv_worker)
fv_add_test(prop_worker property SOURCES property/prop_worker.c ${_rig}
            LIBS fv_worker Threads::Threads TIMEOUT 180)
fv_add_test(prop_worker_s2 property SOURCES property/prop_worker_s2.c ${_rig}
            LIBS fv_worker Threads::Threads TIMEOUT 300)
fv_add_test(prop_worker_latent property SOURCES property/prop_worker_latent.c ${_rig}
            LIBS fv_worker Threads::Threads TIMEOUT 400)
if(FV_WITH_CUDA) # the same histories, each rank a backend of its own on the GPU
    fv_add_test(test_cuda_worker gpu SOURCES property/prop_worker.c ${_rig}
                LIBS fv_worker Threads::Threads TIMEOUT 300)
    fv_add_test(test_cuda_worker_s2 gpu SOURCES property/prop_worker_s2.c ${_rig}
                LIBS fv_worker Threads::Threads TIMEOUT 300)
    fv_add_test(test_cuda_worker_latent gpu SOURCES property/prop_worker_latent.c ${_rig}
                LIBS fv_worker Threads::Threads TIMEOUT 300)
    foreach(_name test_cuda_worker test_cuda_worker_s2 test_cuda_worker_latent)
        target_compile_definitions(${_name} PRIVATE FV_PROP_CUDA)
    endforeach()
endif()
fv_add_test(test_exchange_mpi mpi SOURCES mpi/test_exchange_mpi.c LIBS fv_worker MPI::MPI_C RANKS 3)
fv_add_test(test_worker_serve mpi SOURCES mpi/test_worker_serve.c support/step_pack.c
            LIBS fv_worker MPI::MPI_C RANKS 3)
# The same two again with fewer and with more ranks.
foreach(_name test_exchange_mpi test_worker_serve)
    foreach(_n 2 4)
        add_test(NAME ${_name}_${_n} COMMAND ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG} ${_n}
                 ${MPIEXEC_PREFLAGS} $<TARGET_FILE:${_name}>)
        set_tests_properties(${_name}_${_n} PROPERTIES LABELS mpi TIMEOUT 60 PROCESSORS ${_n}
            SKIP_RETURN_CODE 77 ENVIRONMENT "ASAN_OPTIONS=detect_leaks=0")
    endforeach()
endforeach()
fv_add_test(test_worker_times unit SOURCES unit/test_worker_times.c LIBS fv_worker)
fv_add_test(test_worker unit SOURCES unit/test_worker.c ${_rig} LIBS fv_worker Threads::Threads)
fv_add_test(test_worker_alloc unit SOURCES unit/test_worker_alloc.c LIBS fv_worker)
target_link_options(test_worker_alloc PRIVATE
                    -Wl,--wrap=malloc -Wl,--wrap=calloc -Wl,--wrap=realloc)
fv_add_test(test_journal unit SOURCES unit/test_journal.c LIBS fv_common)
fv_add_test(test_disklog unit SOURCES unit/test_disklog.c support/journal_file.c LIBS fv_common TIMEOUT 120)
fv_add_test(test_store_folder unit SOURCES unit/test_store_folder.c LIBS fv_common)
fv_add_test(test_store_disk unit SOURCES unit/test_store_disk.c support/store_life.c support/journal_file.c LIBS fv_worker TIMEOUT 180)
fv_add_test(test_store unit SOURCES unit/test_store.c support/store_life.c support/journal_file.c LIBS fv_worker TIMEOUT 120)
