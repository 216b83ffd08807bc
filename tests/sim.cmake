# Simulations. sim_job brings a network, a door, MPI and system calls of its own: see sim/world.h.
set(FV_SIM_WRAPPED malloc calloc realloc aligned_alloc posix_memalign strdup free mmap munmap open close eventfd poll recv send
                   sendmsg write shutdown getsockopt getsockname clock_gettime nanosleep sched_yield getrandom getpid kill
                   _exit pthread_create pthread_join fv_log_write)
list(TRANSFORM FV_SIM_WRAPPED PREPEND "LINKER:--wrap=")
if(NOT "${FV_SANITIZE}" STREQUAL "thread") # it has one thread
    fv_add_test(sim_job sim SOURCES sim/sim_job.c sim/story.c sim/clients.c sim/door.c sim/job.c sim/recruit.c sim/faults.c sim/laws.c
                sim/world.c sim/world_memory.c sim/world_calls.c sim/world_socket.c sim/world_mpi.c
                ${PROJECT_SOURCE_DIR}/coord/main_coordinator.c ${PROJECT_SOURCE_DIR}/coord/main_worker.c
                ${PROJECT_SOURCE_DIR}/coord/main_repair.c ${PROJECT_SOURCE_DIR}/coord/main_parts.c
                ${PROJECT_SOURCE_DIR}/coord/main_ranks.c ${PROJECT_SOURCE_DIR}/coord/main_heartbeat.c
                ${PROJECT_SOURCE_DIR}/coord/main_local.c ${PROJECT_SOURCE_DIR}/coord/main_exit.c
                ${PROJECT_SOURCE_DIR}/coord/main_store.c ${PROJECT_SOURCE_DIR}/coord/main_exchange.c
                LIBS fv_coord fv_worker TIMEOUT 120)
    target_compile_definitions(sim_job PRIVATE FV_VERSION="simulated")
    target_link_options(sim_job PRIVATE ${FV_SIM_WRAPPED})
endif()
