# Tests of the C client and of the command-line tool, most of them against a real fovead.
add_library(fv_e2e STATIC client/fovead.c client/mirror.c)
fv_target_defaults(fv_e2e)
target_compile_definitions(fv_e2e PRIVATE _DEFAULT_SOURCE)
target_link_libraries(fv_e2e PUBLIC fv_client fv_kernels PRIVATE m)

# fv_add_e2e_test(test_e2e_x [RANKS]): against one fovead, and with RANKS once more over three ranks.
set(_fv_e2e_launch "mpirun --allow-run-as-root --oversubscribe --mca btl self,vader -np 3")
function(fv_add_e2e_test name)
    fv_add_test(${name} e2e SOURCES client/${name}.c LIBS fv_e2e TIMEOUT 180)
    set(_env "FV_TEST_FOVEAD=$<TARGET_FILE:fovead>;FV_TEST_CLI=$<TARGET_FILE:fovea_cli>")
    set_tests_properties(${name} PROPERTIES ENVIRONMENT "${_env}")
    if("RANKS" IN_LIST ARGN)
        add_test(NAME ${name}_ranks COMMAND ${name})
        set_tests_properties(${name}_ranks PROPERTIES LABELS mpi TIMEOUT 300 PROCESSORS 3
            ENVIRONMENT "${_env};FV_TEST_LAUNCH=${_fv_e2e_launch}")
    endif()
endfunction()

# Once more with every prompt cut into pieces (coord/sched_piece.c), on one rank or, with RANKS, on three.
function(fv_add_e2e_pieces name)
    set(_env "FV_TEST_FOVEAD=$<TARGET_FILE:fovead> --prefill-tokens-per-step 20;FV_TEST_CLI=$<TARGET_FILE:fovea_cli>")
    set(_label e2e)
    set(_n 1)
    if("RANKS" IN_LIST ARGN)
        set(_env "${_env};FV_TEST_LAUNCH=${_fv_e2e_launch}")
        set(_label mpi)
        set(_n 3)
    endif()
    add_test(NAME ${name}_pieces COMMAND ${name})
    set_tests_properties(${name}_pieces PROPERTIES LABELS ${_label} TIMEOUT 300 PROCESSORS ${_n} ENVIRONMENT "${_env}")
endfunction()

fv_add_test(test_npy unit SOURCES client/test_npy.c LIBS fv_npy)
# gRPC is not instrumented: under the thread sanitizer what its queue orders looks like races, mostly the
# service's. The client alone was checked with TSAN_OPTIONS=ignore_noninstrumented_modules=1.
if(FV_SANITIZE MATCHES "thread")
    return()
endif()

fv_add_test(test_client_fake unit SOURCES client/test_client_fake.c client/fake_service.c
            LIBS fv_client fv_rpc TIMEOUT 60)
fv_add_e2e_test(test_e2e_attend RANKS)
fv_add_e2e_test(test_e2e_latent RANKS)
fv_add_e2e_test(test_e2e_session RANKS)
fv_add_e2e_test(test_e2e_stream RANKS)
fv_add_e2e_pieces(test_e2e_attend RANKS)
fv_add_e2e_pieces(test_e2e_latent)
fv_add_e2e_pieces(test_e2e_session)
fv_add_e2e_pieces(test_e2e_stream)
pkg_check_modules(CJSON REQUIRED IMPORTED_TARGET libcjson)
fv_add_e2e_test(test_e2e_cli)
target_link_libraries(test_e2e_cli PRIVATE fv_npy PkgConfig::CJSON)

# The history check; a million operations: FV_HISTORY_OPERATIONS=1000000 (bench/results/history.md).
fv_add_test(test_history e2e SOURCES history/test_history.c history/actor.c history/actor_attend.c history/record.c
            history/killer.c LIBS fv_e2e Threads::Threads m TIMEOUT 180)
set_tests_properties(test_history PROPERTIES ENVIRONMENT "FV_TEST_FOVEAD=$<TARGET_FILE:fovead>")
