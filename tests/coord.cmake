# Tests of coord/: the scheduler core.
fv_add_test(test_token unit SOURCES unit/test_token.c LIBS fv_secret)
fv_add_test(test_auth unit SOURCES unit/test_auth.c LIBS fv_auth)
fv_add_test(test_meet unit SOURCES unit/test_meet.c LIBS fv_coord Threads::Threads TIMEOUT 60)
fv_add_test(test_heartbeat unit SOURCES unit/test_heartbeat.c LIBS fv_coord Threads::Threads)
fv_add_test(test_deadline unit SOURCES unit/test_deadline.c LIBS fv_common)
fv_add_test(test_session unit SOURCES unit/test_session.c LIBS fv_coord)
fv_add_test(test_sched unit SOURCES unit/test_sched.c support/sched_case.c LIBS fv_coord)
fv_add_test(test_sched_pieces unit SOURCES unit/test_sched_pieces.c support/sched_case.c LIBS fv_coord)
fv_add_test(test_sched_latent unit SOURCES unit/test_sched_latent.c support/sched_case.c LIBS fv_coord)
fv_add_test(test_sched_s2 unit SOURCES unit/test_sched_s2.c support/sched_case.c LIBS fv_coord)
fv_add_test(test_ledger unit SOURCES unit/test_ledger.c support/sched_case.c support/journal_file.c LIBS fv_coord)
fv_add_test(test_staging unit SOURCES unit/test_staging.c LIBS fv_coord Threads::Threads)
fv_add_test(test_dispatch unit SOURCES unit/test_dispatch.c support/sched_case.c LIBS fv_coord)
# It brings a door and a link of its own: the archive's are not linked.
fv_add_test(test_engine unit SOURCES unit/test_engine.c support/sched_case.c LIBS fv_coord TIMEOUT 180)
fv_add_test(sim_sched sim SOURCES sim/sim_sched.c support/sched_case.c
            LIBS fv_coord fv_worker TIMEOUT 120)
add_test(NAME test_fovead COMMAND ${PROJECT_SOURCE_DIR}/tests/deploy/test_fovead.sh
         $<TARGET_FILE:fovead> $<TARGET_FILE:fovea_cli>)
set_tests_properties(test_fovead PROPERTIES LABELS mpi TIMEOUT 240 PROCESSORS 2
                     ENVIRONMENT "ASAN_OPTIONS=detect_leaks=0")
