# proto/ and common/config: wire codec, placement arithmetic, options; fuzz targets.
fv_add_test(prop_wire_attend property SOURCES property/prop_wire_attend.c fuzz/wire_oracle.c
            LIBS fv_proto fv_proto_gen)
fv_add_test(test_config unit SOURCES unit/test_config.c LIBS fv_common)
fv_add_test(test_step unit SOURCES unit/test_step.c LIBS fv_proto)
fv_add_test(test_model unit SOURCES unit/test_model.c LIBS fv_common)
fv_add_test(test_latent unit SOURCES unit/test_latent.c LIBS fv_proto)
fv_add_test(test_wire_attend unit SOURCES unit/test_wire_attend.c LIBS fv_proto)
fv_add_test(prop_wire_control property SOURCES property/prop_wire_control.c LIBS fv_proto)
fv_add_test(test_wire_control unit SOURCES unit/test_wire_control.c LIBS fv_proto fv_proto_gen)

# fv_add_fuzz(fuzz_x corpus SOURCES .. LIBS ..): replays fuzz/corpus; a libFuzzer binary with
#   CC=clang cmake -DFV_FUZZ=ON -DFV_SANITIZE=fuzzer-no-link,address,undefined
option(FV_FUZZ "Link the fuzz targets with libFuzzer (needs clang)" OFF)
function(fv_add_fuzz name corpus)
    cmake_parse_arguments(F "" "" "SOURCES;LIBS" ${ARGN})
    add_executable(${name} ${F_SOURCES})
    fv_target_defaults(${name})
    target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
    target_compile_definitions(${name} PRIVATE _DEFAULT_SOURCE _POSIX_C_SOURCE=200809L)
    target_link_libraries(${name} PRIVATE ${F_LIBS})
    if(FV_FUZZ)
        target_link_options(${name} PRIVATE -fsanitize=fuzzer)
        set(_replay -runs=0)
    else()
        target_sources(${name} PRIVATE support/fuzz_main.c)
        set(_replay "")
    endif()
    add_test(NAME ${name} COMMAND ${name} ${_replay} ${CMAKE_CURRENT_SOURCE_DIR}/fuzz/${corpus})
    set_tests_properties(${name} PROPERTIES LABELS fuzz TIMEOUT 60)
endfunction()
fv_add_fuzz(fuzz_wire corpus_wire SOURCES fuzz/fuzz_wire.c fuzz/wire_oracle.c
            LIBS fv_proto fv_proto_gen)
fv_add_fuzz(fuzz_config corpus_config SOURCES fuzz/fuzz_config.c LIBS fv_common)
fv_add_fuzz(fuzz_token corpus_token SOURCES fuzz/fuzz_token.c LIBS fv_secret)
fv_add_fuzz(fuzz_journal corpus_journal SOURCES fuzz/fuzz_journal.c LIBS fv_common)
# no_mpi.c comes before the MPI library: its functions are taken
fv_add_fuzz(fuzz_control corpus_control SOURCES fuzz/fuzz_control.c fuzz/no_mpi.c LIBS fv_worker fv_kernels)
fv_add_fuzz(fuzz_link corpus_link SOURCES fuzz/fuzz_link.c fuzz/no_mpi.c LIBS fv_coord)
