/*
 * cmd_attend.c - `fovea attend`: one attend request whose tensors are .npy files.
 */
#include "client/cli.h"
#include "client/npy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    OPT_MODEL_ID = 2000,
    OPT_SESSION,
    OPT_LAYER,
    OPT_POSITION,
    OPT_NOT_CAUSAL,
    OPT_DTYPE,
    OPT_OUT,
    OPT_LSE,
    OPT_KEEP,
};

typedef struct fv_attend_args {
    fv_spec_options_t spec;
    const char *q_path, *k_path, *v_path, *out_path, *lse_path;
    const char *model_id;
    fovea_session_id_t session;
    bool has_session, has_position, is_not_causal, is_kept;
    uint32_t layer;
    uint64_t position;
    fovea_dtype_t dtype; /* 0 = by the files */
} fv_attend_args_t;

/* The request with all it points to. */
typedef struct fv_attend_job {
    fv_npy_t q, k, v, out, lse;
    fovea_dtype_t dtype;
    uint32_t n_tokens, n_q_heads, n_kv_heads, head_dim_qk, head_dim_v; /* KV heads 0: no k */
} fv_attend_job_t;

static const struct argp_option k_options[] = {
    {0, 0, 0, 0, "Tensors (.npy, C order):", 1},
    {"query", 'q', "FILE", 0, "[tokens, query heads, head dim] (required)", 0},
    {"key", 'k', "FILE", 0, "[tokens, KV heads, head dim]; without k and v nothing is appended", 0},
    {"value", 'v', "FILE", 0, "[tokens, KV heads, head dim v]", 0},
    {"out", OPT_OUT, "FILE", 0, "Where the result goes (default: out.npy)", 0},
    {"lse", OPT_LSE, "FILE", 0, "Also write each row's log-sum-exp, [tokens, query heads] f4", 0},
    {"dtype", OPT_DTYPE, "f32|f16|bf16", 0,
     "What the files hold (default: f4 is f32, f2 f16, u2 bf16)", 0},
    {0, 0, 0, 0, "Where:", 2},
    {"session", OPT_SESSION, "ID", 0, "An open session (default: one is opened, then closed)", 0},
    {"model-id", OPT_MODEL_ID, "ID", 0,
     "Model of the session to open (default: registered from the model options and the shapes)", 0},
    {"keep", OPT_KEEP, 0, 0, "Leave the opened session open and print its id", 0},
    {"layer", OPT_LAYER, "N", 0, "Layer (default 0)", 0},
    {"position", OPT_POSITION, "N", 0, "Of the first token (default: the layer's length)", 0},
    {"not-causal", OPT_NOT_CAUSAL, 0, 0, "Queries also see the tokens after them", 0},
    {0},
};

static error_t parse_paths(int key, const char *arg, fv_attend_args_t *a)
{
    switch (key) {
    case 'q':
        a->q_path = arg;
        return 0;
    case 'k':
        a->k_path = arg;
        return 0;
    case 'v':
        a->v_path = arg;
        return 0;
    case OPT_OUT:
        a->out_path = arg;
        return 0;
    case OPT_LSE:
        a->lse_path = arg;
        return 0;
    case OPT_MODEL_ID:
        a->model_id = arg;
        return 0;
    case OPT_KEEP:
        a->is_kept = true;
        return 0;
    case OPT_NOT_CAUSAL:
        a->is_not_causal = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    fv_attend_args_t *a = state->input;

    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &a->spec;
        return 0;
    case OPT_SESSION:
        a->session = fv_cli_session(state, arg);
        a->has_session = true;
        return 0;
    case OPT_LAYER:
        a->layer = (uint32_t)fv_cli_u64(state, "--layer", arg, UINT32_MAX);
        return 0;
    case OPT_POSITION:
        a->position = fv_cli_u64(state, "--position", arg, UINT64_MAX);
        a->has_position = true;
        return 0;
    case OPT_DTYPE:
        a->dtype = fv_cli_dtype(state, arg);
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument \"%s\"", arg);
        return 0;
    case ARGP_KEY_END:
        if (a->q_path == NULL) {
            argp_error(state, "--query is required");
        }
        if ((a->spec.spec.latent_dim > 0) ? (a->v_path != NULL)
                                          : ((a->k_path == NULL) != (a->v_path == NULL))) {
            argp_error(state,
                       "--key and --value go together; with --latent-dim there is no --value");
        }
        if ((a->k_path == NULL) && !a->has_session) {
            argp_error(state, "without --key and --value there must be a --session to read");
        }
        return 0;
    default:
        return parse_paths(key, arg, a);
    }
}

static const struct argp_child k_children[] = {{&fv_spec_argp, 0, NULL, 3}, {0}};

static const struct argp k_argp = {
    .options = k_options,
    .parser = parse,
    .children = k_children,
    .doc = "Send one attend request with tensors from .npy files and write the answer.\v"
           "Example, a whole prompt with a model made up from the shapes:\n"
           "  fovea attend -q q.npy -k k.npy -v v.npy --lse lse.npy\n\n"
           "Exit codes: 0 success, 1 service or file error, 2 wrong usage.",
};

/* ------------------------------------------------------------------ tensors */

static int complain(const char *text)
{
    (void)fprintf(stderr, "fovea: %s\n", text);
    return FV_EXIT_SERVICE;
}

static fovea_dtype_t dtype_of(fv_npy_type_t type)
{
    return (type == FV_NPY_F4)   ? FOVEA_DTYPE_F32
           : (type == FV_NPY_F2) ? FOVEA_DTYPE_F16
                                 : FOVEA_DTYPE_BF16;
}

/* Reads one tensor of three dimensions that fit 32 bits, of the job's dtype. */
static int read_tensor(const char *path, const fv_attend_job_t *job, fv_npy_t *out)
{
    char text[FV_NPY_TEXT_BYTES];

    if (!fv_npy_read(path, out, text)) {
        return complain(text);
    }
    if ((out->n_dims != 3) || (out->shape[0] > UINT32_MAX) || (out->shape[1] > UINT32_MAX) ||
        (out->shape[2] > UINT32_MAX)) {
        (void)snprintf(text, sizeof(text), "%s: shape: given %u dimensions, expected 3", path,
                       out->n_dims);
        return complain(text);
    }
    if ((job->dtype != 0) && (fv_npy_type_bytes(out->type) != fovea_dtype_bytes(job->dtype))) {
        (void)snprintf(text, sizeof(text), "%s: dtype: given %zu bytes an element, expected %zu",
                       path, fv_npy_type_bytes(out->type), fovea_dtype_bytes(job->dtype));
        return complain(text);
    }
    return FV_EXIT_OK;
}

/* out [T, Hq, dv] in the dtype of q, lse [T, Hq]. */
static int alloc_results(const fv_attend_args_t *a, fv_attend_job_t *job)
{
    size_t rows = (size_t)job->n_tokens * job->n_q_heads;

    job->out = (fv_npy_t){.type = job->q.type,
                          .n_dims = 3,
                          .shape = {job->n_tokens, job->n_q_heads, job->head_dim_v},
                          .n_bytes = rows * job->head_dim_v * fovea_dtype_bytes(job->dtype)};
    job->out.data = malloc(job->out.n_bytes + 1);
    if (a->lse_path != NULL) {
        job->lse = (fv_npy_t){.type = FV_NPY_F4,
                              .n_dims = 2,
                              .shape = {job->n_tokens, job->n_q_heads},
                              .n_bytes = rows * sizeof(float)};
        job->lse.data = malloc(job->lse.n_bytes + 1);
    }
    if ((job->out.data == NULL) || ((a->lse_path != NULL) && (job->lse.data == NULL))) {
        return complain("out of memory");
    }
    return FV_EXIT_OK;
}

static int load(const fv_attend_args_t *a, fv_attend_job_t *job)
{
    int rc = FV_EXIT_OK;

    job->dtype = a->dtype;
    rc = read_tensor(a->q_path, job, &job->q);
    if (rc != FV_EXIT_OK) {
        return rc;
    }
    job->dtype = (a->dtype != 0) ? a->dtype : dtype_of(job->q.type);
    job->n_tokens = (uint32_t)job->q.shape[0];
    job->n_q_heads = (uint32_t)job->q.shape[1];
    job->head_dim_qk = (uint32_t)job->q.shape[2];
    job->head_dim_v = (a->spec.spec.head_dim_v != 0) ? a->spec.spec.head_dim_v : job->head_dim_qk;
    if (a->spec.spec.latent_dim > 0) {
        job->head_dim_v = a->spec.spec.latent_dim;
    }
    if (a->k_path != NULL) {
        rc = read_tensor(a->k_path, job, &job->k);
        if ((rc == FV_EXIT_OK) && (a->v_path != NULL)) {
            rc = read_tensor(a->v_path, job, &job->v);
        }
        if (rc != FV_EXIT_OK) {
            return rc;
        }
        job->n_kv_heads = (uint32_t)job->k.shape[1];
        job->head_dim_v = (a->v_path != NULL) ? (uint32_t)job->v.shape[2] : job->head_dim_v;
    }
    return alloc_results(a, job);
}

static void job_free(fv_attend_job_t *job)
{
    fv_npy_free(&job->q);
    fv_npy_free(&job->k);
    fv_npy_free(&job->v);
    fv_npy_free(&job->out);
    fv_npy_free(&job->lse);
}

/* ------------------------------------------------------------------ the request */

/* Registers the model that the shapes and options describe. */
static fovea_code_t register_model(const fv_cli_t *cli,
                                   fovea_client_t *client,
                                   const fv_attend_args_t *a,
                                   const fv_attend_job_t *job,
                                   fovea_model_t *out,
                                   fovea_error_t *error)
{
    fovea_model_spec_t spec = a->spec.spec;

    spec.name = (spec.name == NULL) ? "fovea-attend" : spec.name;
    spec.n_layers = (spec.n_layers == 0) ? (a->layer + 1) : spec.n_layers;
    spec.n_q_heads = (spec.n_q_heads == 0) ? job->n_q_heads : spec.n_q_heads;
    spec.n_kv_heads = (spec.n_kv_heads == 0) ? job->n_kv_heads : spec.n_kv_heads;
    spec.head_dim_qk = (spec.head_dim_qk == 0) ? job->head_dim_qk : spec.head_dim_qk;
    spec.head_dim_v = job->head_dim_v;
    spec.kv_dtype = (spec.kv_dtype == 0) ? job->dtype : spec.kv_dtype;
    return fovea_register_model(client, &spec, cli->timeout_ms, out, error);
}

static fovea_code_t open_session(const fv_cli_t *cli,
                                 fovea_client_t *client,
                                 const fv_attend_args_t *a,
                                 const fv_attend_job_t *job,
                                 fovea_session_id_t *out,
                                 fovea_error_t *error)
{
    const char *model_id = a->model_id;
    fovea_model_t model;

    if (model_id == NULL) {
        fovea_code_t code = register_model(cli, client, a, job, &model, error);
        if (code != FOVEA_OK) {
            return code;
        }
        model_id = model.model_id;
    }
    return fovea_open_session(client, model_id, NULL, cli->timeout_ms, out, error);
}

/* The layer's length: where new tokens go; a query that appends nothing asks from there backwards. */
static fovea_code_t find_position(const fv_cli_t *cli,
                                  fovea_client_t *client,
                                  const fv_attend_args_t *a,
                                  const fv_attend_job_t *job,
                                  fovea_attend_item_t *item,
                                  fovea_error_t *error)
{
    fovea_session_info_t info = {0};
    fovea_code_t code = fovea_get_session(client, &item->session, cli->timeout_ms, &info, error);

    if (code == FOVEA_OK) {
        uint64_t length = (a->layer < info.n_layers) ? info.layer_tokens[a->layer] : 0;
        bool is_query_only = a->k_path == NULL;
        item->position =
            is_query_only ? ((length > job->n_tokens) ? (length - job->n_tokens) : 0) : length;
        fovea_session_info_free(&info);
    }
    return code;
}

static int attend(const fv_cli_t *cli,
                  fovea_client_t *client,
                  const fv_attend_args_t *a,
                  fv_attend_job_t *job,
                  const fovea_session_id_t *session)
{
    fovea_attend_item_t item = {
        .session = *session, .position = a->position, .n_tokens = job->n_tokens};
    fovea_attend_request_t request = {
        .layer = a->layer,
        .dtype = job->dtype,
        .flags = (a->is_not_causal ? FOVEA_ATTEND_NOT_CAUSAL : 0U) |
                 ((a->k_path == NULL) ? FOVEA_ATTEND_QUERY_ONLY : 0U),
        .n_items = 1,
        .items = &item,
        .q = job->q.data,
        .q_bytes = job->q.n_bytes,
        .k = job->k.data,
        .k_bytes = job->k.n_bytes,
        .v = job->v.data,
        .v_bytes = job->v.n_bytes,
        .out = job->out.data,
        .out_bytes = job->out.n_bytes,
        .lse = job->lse.data,
        .lse_bytes = job->lse.n_bytes,
    };
    char text[FV_NPY_TEXT_BYTES];
    fovea_timings_t t;
    fovea_error_t error;

    if (!a->has_position && (find_position(cli, client, a, job, &item, &error) != FOVEA_OK)) {
        return fv_cli_error(&error);
    }
    if (fovea_attend(client, &request, cli->timeout_ms, &t, &error) != FOVEA_OK) {
        return fv_cli_error(&error);
    }
    if (!fv_npy_write(a->out_path, &job->out, text) ||
        ((a->lse_path != NULL) && !fv_npy_write(a->lse_path, &job->lse, text))) {
        return complain(text);
    }
    (void)fprintf(stderr,
                  "%u tokens at %llu: queue %u us, compute %u us, exchange %u us, total %u us\n",
                  job->n_tokens, (unsigned long long)item.position, t.queue_us, t.compute_us,
                  t.exchange_us, t.total_us);
    return FV_EXIT_OK;
}

static int
run(const fv_cli_t *cli, fovea_client_t *client, const fv_attend_args_t *a, fv_attend_job_t *job)
{
    fovea_session_id_t session = a->session;
    char id[FOVEA_SESSION_TEXT_BYTES];
    fovea_error_t error;
    int rc = FV_EXIT_OK;

    if (!a->has_session && (open_session(cli, client, a, job, &session, &error) != FOVEA_OK)) {
        return fv_cli_error(&error);
    }
    rc = attend(cli, client, a, job, &session);
    if (!a->has_session && a->is_kept) {
        fovea_session_id_format(&session, id);
        (void)printf("%s\n", id);
    } else if (!a->has_session &&
               (fovea_close_session(client, &session, cli->timeout_ms, &error) != FOVEA_OK)) {
        rc = fv_cli_error(&error);
    }
    return rc;
}

int fv_cmd_attend(const fv_cli_t *cli, int argc, char **argv)
{
    fv_attend_args_t a = {.out_path = "out.npy"};
    fv_attend_job_t job = {0};
    fovea_client_t *client = NULL;
    int rc = FV_EXIT_OK;

    (void)argp_parse(&k_argp, argc, argv, 0, NULL, &a);
    rc = load(&a, &job);
    if (rc == FV_EXIT_OK) {
        rc = fv_cli_connect(cli, &client);
    }
    if (rc == FV_EXIT_OK) {
        rc = run(cli, client, &a, &job);
    }
    fovea_close(client);
    job_free(&job);
    return rc;
}
