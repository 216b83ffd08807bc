/*
 * job.h - a job of simulated processes: what mpirun and fovead-run do, and what goes wrong.
 *
 *   job.c       starts ranks and spares, starts them again when the coordinator has left
 *   recruit.c   starts a rank anew, in a lost one's place
 *   door.c      the coordinator's gRPC door, and how clients come to it
 *   faults.c    deaths, stops, partitions, slow networks
 *   laws.c      what must hold of every control message
 *   clients.c   clients, each with its model of what the service holds
 *   story.c     one seed from begin to end
 *
 * Thread: one.
 */
#ifndef FV_TESTS_SIM_JOB_H
#define FV_TESTS_SIM_JOB_H

#include "coord/main_process.h"
#include "coord/rpc.h"
#include "tests/sim/world.h"

#define SIM_PRINCIPALS 2

/* What a story says of its job. */
typedef struct sim_job_config {
    uint32_t n_ranks, n_spares, n_hosts;
    bool is_durable;
    bool is_dedicated; /* rank 0 has no share */
    bool has_recruits; /* a lost rank without a spare is started anew */
    uint64_t kv_bytes; /* of a rank */
    int32_t prefill_tokens_per_step;
    const char *dir; /* empty; for what outlives processes */
} sim_job_config_t;

/* Stops the story: something that must not be. */
void sim_fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
/* One line of the story, when it is told. */
void sim_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ------------------------------------------------------------------ job.c */

void sim_job_begin(const sim_job_config_t *config);
uint32_t sim_job_n_processes(void);
uint32_t sim_job_n_starts(void);
/* The process's state; NULL: it is dead. */
fv_process_t *sim_job_process(uint32_t number);
/* Some session's part may be gone for good: a shard's place moved to another host, or nothing is durable. */
bool sim_job_may_lose(void);
/* A process is a rank now. */
void sim_job_note_rank(uint32_t rank, uint32_t process);
/* A process was killed, stopped, or cut off since the last start. */
void sim_job_note_fault(void);
/* After a Drain: every process has left, as it should. */
bool sim_job_has_ended(void);

void sim_job_start_recruit(uint32_t number);
void sim_job_name_host(uint32_t number, char out[64]);

/* ------------------------------------------------------------------ recruit.c */

void sim_recruits_begin(bool is_on);

/* ------------------------------------------------------------------ door.c */

typedef struct sim_answer {
    int code; /* of gRPC */
    char text[FV_ERROR_TEXT_BYTES];
    const uint8_t *data; /* code 0 */
    size_t n_bytes;
} sim_answer_t;

typedef struct sim_caller {
    void (*on_answer)(void *arg, uint64_t tag, const sim_answer_t *answer);
    void *arg;
    uint64_t tag;
    uint32_t principal;
} sim_caller_t;

void sim_door_begin(void);
void sim_door_end(void);
/* Rank 0 is dead: whoever waits for an answer is told so. */
void sim_door_drop(void);
/* Sends one message, which is copied; the answer, or UNAVAILABLE, comes later, exactly once. Returns a handle. */
uint64_t
sim_door_send(fv_method_t method, const void *data, size_t n_bytes, const sim_caller_t *caller);
/* The client of a call is gone; it hears nothing more. */
void sim_door_cancel(uint64_t handle);

/* ------------------------------------------------------------------ laws.c */

void sim_laws_begin(void);
/* A control connection of rank 0 (end 0) with a process. */
void sim_laws_watch(int connection, uint32_t process);
/* When nothing is under way: what the coordinator knows of ranks and owners is what there is; `is_empty`: no session is left. */
void sim_laws_check_quiet(bool is_empty);

/* ------------------------------------------------------------------ faults.c */

/* Who gets the nth message of a type dies at a call after that; 400 ms later rank 0 does. Nothing happens by chance. */
typedef struct sim_plan {
    uint16_t type; /* fv_ctl_type_t */
    uint32_t nth, n_calls;
    bool
        has_second; /* instead of rank 0 another rank dies in the repair, before it has said HELLO */
} sim_plan_t;

/* plan NULL: by chance. */
void sim_faults_begin(const sim_job_config_t *config, const sim_plan_t *plan, int64_t until_us);
/* Rank 0 has begun to say something to a process. */
void sim_faults_on_message(uint32_t process, uint16_t type);

/* ------------------------------------------------------------------ clients.c */

void sim_clients_begin(uint32_t n, uint32_t n_operations);
bool sim_clients_are_done(void);

typedef struct sim_counts {
    uint64_t n_operations, n_served, n_retries, n_refused, n_exhausted, n_cancelled, n_lost,
        n_starts, n_kills, n_stops, n_partitions, n_epochs, n_messages;
} sim_counts_t;
extern sim_counts_t g_sim_counts;

/* ------------------------------------------------------------------ story.c */

void sim_story(uint64_t seed, const sim_plan_t *plan);
void sim_story_clean(void); /* after the last one: no file is left */

#endif /* FV_TESTS_SIM_JOB_H */
