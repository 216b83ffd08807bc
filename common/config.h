/*
 * config.h - what a person can set about fovead, and where it comes from.
 *
 * Sources, later ones win: the defaults, the file named by --config (or FV_CONFIG), the environment
 * (key kv_memory is FV_KV_MEMORY), the command line (--kv-memory). The table in config_table.c is the one list of
 * options: help, file, environment, --print-config and docs/configuration.md all follow from it.
 *
 * Thread: main, before any other starts.
 */
#ifndef FV_COMMON_CONFIG_H
#define FV_COMMON_CONFIG_H

#include "common/status.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define FV_CONFIG_ADDRESSES_MAX 8
#define FV_CONFIG_TEXT_BYTES    128
#define FV_CONFIG_PATH_BYTES    512

/* What the command line asks the program to do. */
typedef enum fv_config_action {
    FV_CONFIG_RUN = 0,
    FV_CONFIG_PRINT,   /* --print-config: fv_config_print() and leave */
    FV_CONFIG_HELP,    /* --help: fv_config_help() and leave; nothing else was read */
    FV_CONFIG_VERSION, /* --version; nothing else was read */
} fv_config_action_t;

/* "host:port", "[v6]:port" or "unix:/path" each, in the order given. */
typedef struct fv_address_list {
    uint32_t n;
    uint32_t source; /* which source gave them; a later source replaces the list */
    char text[FV_CONFIG_ADDRESSES_MAX][FV_CONFIG_TEXT_BYTES];
} fv_address_list_t;

/* Either bytes, or (percent > 0) that share of what is free at start. */
typedef struct fv_memory_limit {
    uint64_t bytes;
    int32_t percent; /* 0..100 */
} fv_memory_limit_t;

typedef struct fv_config {
    fv_config_action_t action;
    /* service */
    fv_address_list_t listen;
    int32_t drain_timeout_ms;
    char log_level[FV_CONFIG_TEXT_BYTES]; /* for fv_log_level_parse() */
    /* access */
    char tokens[FV_CONFIG_PATH_BYTES]; /* paths: "" = none */
    char tls_cert[FV_CONFIG_PATH_BYTES], tls_key[FV_CONFIG_PATH_BYTES];
    char tls_client_ca[FV_CONFIG_PATH_BYTES];
    char unix_mode[FV_CONFIG_TEXT_BYTES];  /* "auto", or octal digits */
    char unix_peers[FV_CONFIG_TEXT_BYTES]; /* "any", "group", "user" */
    bool insecure;
    /* ranks */
    fv_memory_limit_t kv_memory;         /* of one rank */
    int32_t threads;                     /* of one rank; 0 = as many as it may run on */
    char backend[FV_CONFIG_TEXT_BYTES];  /* "auto", "cpu", "null" */
    char isa[FV_CONFIG_TEXT_BYTES];      /* as fv_backend_config_t.isa */
    char exchange[FV_CONFIG_TEXT_BYTES]; /* "auto", "mpi", "nccl", "nccl-collective" */
    uint64_t exchange_memory;            /* bytes of each GPU */
    bool dedicated_coordinator;
    char control_address[FV_CONFIG_TEXT_BYTES]; /* "auto", or an address as in listen */
    /* steps */
    int32_t shard_tokens; /* multiple of FV_PAGE_TOKENS */
    int32_t step_tokens_max;
    int32_t prefill_tokens_per_step;
    char context_prefill[FV_CONFIG_TEXT_BYTES]; /* "auto", "visit", "move" */
    uint64_t move_memory;                       /* bytes of each rank's kv_memory */
    int32_t step_deadline_ms;
    /* recovery */
    int32_t heartbeat_ms;     /* 0 = no heartbeats */
    int32_t heartbeat_misses; /* in a row: the rank is lost */
    int32_t start_deadline_ms;
    int32_t spares; /* of the processes, so many wait to take a lost rank's place */
    bool respawn;   /* no spare: a process is started in a lost rank's place */
    int32_t repair_deadline_ms;
    /* limits */
    uint64_t message_max;    /* bytes; below 2 GiB */
    int32_t stream_inflight; /* requests of one stream */
    int32_t connection_streams;
    uint64_t request_memory; /* bytes */
    uint64_t grpc_memory;    /* bytes */
    int32_t sessions_max;
    int32_t session_tokens_max; /* of one layer of one session */
    int32_t session_idle_s;     /* 0 = never */
    int32_t batch_max;          /* items of one request */
    int32_t calls_max;          /* open at once, all connections together */
    int32_t health_calls_max;   /* of grpc.health.v1, besides calls_max */
    int32_t first_message_ms;   /* from a call's headers to its message; not of Attend streams */
    int32_t connections_max;
    uint64_t metadata_max; /* bytes */
    /* durability */
    char durability[FV_CONFIG_TEXT_BYTES]; /* "none", "process", "host" */
    char store_dir[FV_CONFIG_PATH_BYTES];  /* "" = /dev/shm/fovea-UID */
    char disk_dir[FV_CONFIG_PATH_BYTES];   /* "" = none */
    char job[FV_CONFIG_PATH_BYTES];        /* "" = from the first address */
    bool store_keep, store_discard;
} fv_config_t;

/*
 * Reads all sources. `env` is a NULL-terminated list of NAME=value (environ). argv is not changed. Errors:
 * FV_ERR_INVALID_ARG naming key, source (file:line, environment variable or command line), given and expected;
 * FV_ERR_NOT_FOUND for a file that cannot be opened. `out` is written only on FV_OK.
 */
FV_MUST_CHECK fv_status_t fv_config_load(int argc,
                                         char *const *argv,
                                         char *const *env,
                                         fv_config_t *out);

/* All defaults. */
void fv_config_defaults(fv_config_t *out);

/* Writes the configuration as a file that --config reads back to the same. */
void fv_config_print(const fv_config_t *config, FILE *out);

/* Writes docs/configuration.md: where options are set, and the table of them. */
void fv_config_print_markdown(FILE *out);

/* Writes what --help shows. */
void fv_config_help(const char *program, FILE *out);

#endif /* FV_COMMON_CONFIG_H */
