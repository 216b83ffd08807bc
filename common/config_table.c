/*
 * config_table.c - every option of fovead, once.
 */
#include "common/config_table.h"

#include "common/model.h"

#include <ctype.h>
#include <string.h>

#define AT(member) offsetof(fv_config_t, member)
#define K          ((uint64_t)1 << 10)
#define M          ((uint64_t)1 << 20)
#define G          ((uint64_t)1 << 30)
#define T          ((uint64_t)1 << 40)

const fv_option_t fv_options[] = {
    {.group = "Service",
     .name = "listen",
     .arg = "ADDRESS",
     .value = "127.0.0.1:7411",
     .help =
         "Where clients connect: host:port, [v6]:port or unix:/path. May be given up to 8 times.",
     .type = FV_OPTION_ADDRESSES,
     .offset = AT(listen)},
    {.name = "log_level",
     .arg = "LEVEL",
     .value = "info",
     .help = "How much goes to stderr.",
     .type = FV_OPTION_CHOICE,
     .offset = AT(log_level),
     .choices = "error warn info debug trace"},
    {.name = "drain_timeout_ms",
     .arg = "MS",
     .value = "10000",
     .help = "How long a stop waits for requests under way.",
     .type = FV_OPTION_INT,
     .offset = AT(drain_timeout_ms),
     .max = 3600000},
    {.group = "Access",
     .name = "tokens",
     .arg = "FILE",
     .value = "",
     .help =
         "Who may use the service: a file of token hashes as `fovea token` writes it; read again when it "
         "changes. Nothing: anybody who can connect.",
     .type = FV_OPTION_PATH,
     .offset = AT(tokens)},
    {.name = "tls_cert",
     .arg = "FILE",
     .value = "",
     .help = "TLS on every host:port: certificate chain (PEM); read again when it changes.",
     .type = FV_OPTION_PATH,
     .offset = AT(tls_cert)},
    {.name = "tls_key",
     .arg = "FILE",
     .value = "",
     .help = "Its private key (PEM).",
     .type = FV_OPTION_PATH,
     .offset = AT(tls_key)},
    {.name = "tls_client_ca",
     .arg = "FILE",
     .value = "",
     .help = "Clients must show a certificate that one of these has signed (PEM).",
     .type = FV_OPTION_PATH,
     .offset = AT(tls_client_ca)},
    {.name = "insecure",
     .arg = "BOOL",
     .value = "false",
     .help =
         "Serve beyond this host although there is neither TLS nor a token file: anybody who reaches the "
         "port may read and change everything.",
     .type = FV_OPTION_BOOL,
     .offset = AT(insecure)},
    {.name = "unix_mode",
     .arg = "MODE",
     .value = "auto",
     .help = "File mode of unix sockets; auto = as the umask has it.",
     .type = FV_OPTION_CHOICE,
     .offset = AT(unix_mode),
     .choices = "auto 600 660 666"},
    {.name = "unix_peers",
     .arg = "WHO",
     .value = "any",
     .help =
         "Whose processes may connect to unix sockets: any that the file mode lets, those of the service's "
         "user (and root), or of its group too.",
     .type = FV_OPTION_CHOICE,
     .offset = AT(unix_peers),
     .choices = "any user group"},
    {.group = "Ranks",
     .name = "kv_memory",
     .arg = "BYTES|PERCENT",
     .value = "90%",
     .help =
         "KV cache of each rank: bytes (512m, 16g), or a share of the memory that is free at start.",
     .type = FV_OPTION_MEMORY,
     .offset = AT(kv_memory),
     .min = 64U * K,
     .max = 1024U * T},
    {.name = "threads",
     .arg = "N",
     .value = "0",
     .help = "Compute threads of each CPU rank; 0 = one for each core it may run on.",
     .type = FV_OPTION_INT,
     .offset = AT(threads),
     .max = 1024},
    {.name = "backend",
     .arg = "NAME",
     .value = "auto",
     .help = "What computes. null answers without computing, to measure everything else.",
     .type = FV_OPTION_CHOICE,
     .offset = AT(backend),
     .choices = "auto cpu cuda null"},
    {.name = "isa",
     .arg = "NAME",
     .value = "auto",
     .help = "Instruction set of the CPU backend; auto = the best one this machine has.",
     .type = FV_OPTION_CHOICE,
     .offset = AT(isa),
     .choices = "auto amx avx512 avx2 portable"},
    {.name = "exchange",
     .arg = "NAME",
     .value = "auto",
     .help =
         "How ranks exchange partial results; auto = nccl where every rank has a GPU of its own, else mpi. "
         "nccl-collective uses no memory shared between GPUs.",
     .type = FV_OPTION_CHOICE,
     .offset = AT(exchange),
     .choices = "auto mpi nccl nccl-collective"},
    {.name = "exchange_memory",
     .arg = "BYTES",
     .value = "256m",
     .help =
         "Memory of each GPU for partial results of others; a step needs 2 x tokens x query heads x (head_dim_v + 1) "
         "x 4 bytes of it, whatever the number of ranks. Larger messages take NCCL's send and receive.",
     .type = FV_OPTION_BYTES,
     .offset = AT(exchange_memory),
     .min = M,
     .max = 64U * G},
    {.name = "dedicated_coordinator",
     .arg = "BOOL",
     .value = "false",
     .help = "Rank 0 only coordinates and holds no KV.",
     .type = FV_OPTION_BOOL,
     .offset = AT(dedicated_coordinator)},
    {.name = "control_address",
     .arg = "ADDRESS",
     .value = "auto",
     .help =
         "Where ranks reach the coordinator: host:port or unix:/path; auto = a unix socket when all "
         "ranks are on one host, TCP otherwise.",
     .type = FV_OPTION_ADDRESS,
     .offset = AT(control_address)},
    {.group = "Steps",
     .name = "shard_tokens",
     .arg = "TOKENS",
     .value = "2048",
     .help = "Context sharding: tokens in a row that one rank holds before the next rank's turn.",
     .type = FV_OPTION_INT,
     .offset = AT(shard_tokens),
     .min = FV_PAGE_TOKENS,
     .max = 1U << 20U,
     .multiple = FV_PAGE_TOKENS},
    {.name = "step_tokens_max",
     .arg = "TOKENS",
     .value = "8192",
     .help = "Query tokens that one step takes at most; what is more waits for the next.",
     .type = FV_OPTION_INT,
     .offset = AT(step_tokens_max),
     .min = 1,
     .max = 1U << 20U},
    {.name = "prefill_tokens_per_step",
     .arg = "TOKENS",
     .value = "0",
     .help =
         "Prompt tokens that one step takes at most; a longer request is served in pieces, decode goes first. 0 = as "
         "many as take half as long as the decode beside them, by what steps were measured to take.",
     .type = FV_OPTION_INT,
     .offset = AT(prefill_tokens_per_step),
     .max = 1U << 20U},
    {.name = "step_deadline_ms",
     .arg = "MS",
     .value = "600000",
     .help =
         "A rank that has not finished its part of a step by then counts as lost. Longer than the longest "
         "prefill chunk takes; a rank that dies is noticed at once, whatever this says.",
     .type = FV_OPTION_INT,
     .offset = AT(step_deadline_ms),
     .min = 100,
     .max = 3600000},
    {.group = "Recovery",
     .name = "heartbeat_ms",
     .arg = "MS",
     .value = "200",
     .help =
         "How often ranks tell each other that they live; finds ranks that are stopped and hosts that are cut "
         "off. 0 = never.",
     .type = FV_OPTION_INT,
     .offset = AT(heartbeat_ms),
     .max = 60000},
    {.name = "heartbeat_misses",
     .arg = "N",
     .value = "5",
     .help =
         "So many heartbeats missed in a row: the rank is lost, and a rank that hears nothing of the coordinator "
         "leaves by itself. Between hosts not before 5 s, which a short outage of the network may take.",
     .type = FV_OPTION_INT,
     .offset = AT(heartbeat_misses),
     .min = 2,
     .max = 1000},
    {.name = "start_deadline_ms",
     .arg = "MS",
     .value = "300000",
     .help = "A start that takes longer fails: ranks wait for each other, and one may have died.",
     .type = FV_OPTION_INT,
     .offset = AT(start_deadline_ms),
     .min = 1000,
     .max = 3600000},
    {.name = "spares",
     .arg = "N",
     .value = "0",
     .help =
         "Of the processes that mpirun starts the last N are no ranks, but wait to take the place of one that is "
         "lost. CPU ranks only.",
     .type = FV_OPTION_INT,
     .offset = AT(spares),
     .max = 1000},
    {.name = "repair_deadline_ms",
     .arg = "MS",
     .value = "5000",
     .help = "A repair that takes longer is given up: the job ends, to be started again.",
     .type = FV_OPTION_INT,
     .offset = AT(repair_deadline_ms),
     .min = 100,
     .max = 600000},
    {.group = "Limits",
     .name = "message_max",
     .arg = "BYTES",
     .value = "256m",
     .help = "The largest request message.",
     .type = FV_OPTION_BYTES,
     .offset = AT(message_max),
     .min = 64U * K,
     .max = (2U * G) - 1U},
    {.name = "stream_inflight",
     .arg = "N",
     .value = "64",
     .help = "Requests of one Attend stream that are read before the oldest is answered.",
     .type = FV_OPTION_INT,
     .offset = AT(stream_inflight),
     .min = 1,
     .max = 65536},
    {.name = "connection_streams",
     .arg = "N",
     .value = "1024",
     .help = "Calls open at once on one connection.",
     .type = FV_OPTION_INT,
     .offset = AT(connection_streams),
     .min = 1,
     .max = 1000000},
    {.name = "request_memory",
     .arg = "BYTES",
     .value = "1g",
     .help = "Memory for the tensors of requests that wait or run.",
     .type = FV_OPTION_BYTES,
     .offset = AT(request_memory),
     .min = M,
     .max = 1024U * T},
    {.name = "grpc_memory",
     .arg = "BYTES",
     .value = "512m",
     .help = "Memory that gRPC may hold for messages it is receiving.",
     .type = FV_OPTION_BYTES,
     .offset = AT(grpc_memory),
     .min = 16U * M,
     .max = 1024U * T},
    {.name = "sessions_max",
     .arg = "N",
     .value = "100000",
     .help = "Sessions open at once.",
     .type = FV_OPTION_INT,
     .offset = AT(sessions_max),
     .min = 1,
     .max = 10000000},
    {.name = "session_tokens_max",
     .arg = "TOKENS",
     .value = "16777216",
     .help = "Tokens of one session.",
     .type = FV_OPTION_INT,
     .offset = AT(session_tokens_max),
     .min = 1,
     .max = 2147483647},
    {.name = "session_idle_s",
     .arg = "SECONDS",
     .value = "0",
     .help = "A session that nobody has used for so long is closed; 0 = never.",
     .type = FV_OPTION_INT,
     .offset = AT(session_idle_s),
     .max = 31536000},
    {.name = "batch_max",
     .arg = "N",
     .value = "4096",
     .help = "Sessions (items) of one Attend request.",
     .type = FV_OPTION_INT,
     .offset = AT(batch_max),
     .min = 1,
     .max = 4096},
    {.name = "calls_max",
     .arg = "N",
     .value = "16384",
     .help = "Calls open at once, of all connections together.",
     .type = FV_OPTION_INT,
     .offset = AT(calls_max),
     .min = 1,
     .max = 10000000},
    {.name = "connections_max",
     .arg = "N",
     .value = "4096",
     .help = "Connections open at once.",
     .type = FV_OPTION_INT,
     .offset = AT(connections_max),
     .min = 1,
     .max = 1000000},
    {.name = "metadata_max",
     .arg = "BYTES",
     .value = "16k",
     .help = "Headers of one call.",
     .type = FV_OPTION_BYTES,
     .offset = AT(metadata_max),
     .min = K,
     .max = M},
};
const size_t fv_n_options = sizeof(fv_options) / sizeof(fv_options[0]);

const fv_option_t *fv_option_find(const char *name)
{
    for (size_t i = 0; i < fv_n_options; i++) {
        if (strcmp(fv_options[i].name, name) == 0) {
            return &fv_options[i];
        }
    }
    return NULL;
}

void fv_option_env_name(const fv_option_t *option, char *out, size_t cap)
{
    size_t n = (size_t)snprintf(out, cap, "FV_%s", option->name);

    for (size_t i = 0; (i < n) && (i < cap); i++) {
        out[i] = (char)toupper((unsigned char)out[i]);
    }
}

void fv_option_long_name(const fv_option_t *option, char *out, size_t cap)
{
    (void)snprintf(out, cap, "%s", option->name);
    for (char *c = out; *c != '\0'; c++) {
        if (*c == '_') {
            *c = '-';
        }
    }
}
