/*
 * attend.c - the shortest whole client: one layer, a prompt of four tokens, then one decode step.
 *
 *     cc attend.c -lfovea -o attend && ./attend unix:/tmp/fovea.sock
 */
#include <fovea.h>
#include <stdio.h>

enum {
    N_Q_HEADS = 4,
    N_KV_HEADS = 2,
    HEAD_DIM = 64,
    N_PROMPT = 4
};

/* A frontend has these from its model: projected, with rotary embedding applied. */
static float q[N_PROMPT][N_Q_HEADS][HEAD_DIM];
static float k[N_PROMPT][N_KV_HEADS][HEAD_DIM];
static float v[N_PROMPT][N_KV_HEADS][HEAD_DIM];
static float out[N_PROMPT][N_Q_HEADS][HEAD_DIM];

/* Appends n_tokens tokens at `position` and computes their attention into `out`. */
static fovea_code_t attend(fovea_client_t *client,
                           fovea_session_id_t session,
                           uint64_t position,
                           uint32_t n_tokens,
                           fovea_error_t *error)
{
    fovea_attend_item_t item = {.session = session, .position = position, .n_tokens = n_tokens};
    fovea_attend_request_t request = {.dtype = FOVEA_DTYPE_F32, .n_items = 1, .items = &item};

    request.q = q;
    request.q_bytes = n_tokens * sizeof(q[0]);
    request.k = k;
    request.k_bytes = n_tokens * sizeof(k[0]);
    request.v = v;
    request.v_bytes = n_tokens * sizeof(v[0]);
    request.out = out;
    request.out_bytes = n_tokens * sizeof(out[0]);
    return fovea_attend(client, &request, FOVEA_TIMEOUT_DEFAULT, NULL, error);
}

int main(int argc, char **argv)
{
    fovea_model_spec_t spec = {.name = "example",
                               .n_layers = 1,
                               .n_q_heads = N_Q_HEADS,
                               .n_kv_heads = N_KV_HEADS,
                               .head_dim_qk = HEAD_DIM,
                               .kv_dtype = FOVEA_DTYPE_F32};
    fovea_client_t *client = NULL;
    fovea_session_id_t session;
    fovea_model_t model;
    fovea_error_t error = {FOVEA_OK, ""};

    for (int t = 0; t < N_PROMPT;
         t++) { /* v of token t is t + 1, so the averages can be foretold */
        for (int d = 0; d < N_KV_HEADS * HEAD_DIM; d++) {
            v[t][d / HEAD_DIM][d % HEAD_DIM] = (float)(t + 1);
        }
    }
    if ((fovea_connect((argc > 1) ? argv[1] : "127.0.0.1:7411", NULL, &client, &error) == 0) &&
        (fovea_register_model(client, &spec, 0, &model, &error) == 0) &&
        (fovea_open_session(client, model.model_id, NULL, 0, &session, &error) == 0) &&
        (attend(client, session, 0, N_PROMPT, &error) == 0)) {
        (void)printf("prompt, last token: %g (expected 2.5)\n", (double)out[N_PROMPT - 1][0][0]);
        if (attend(client, session, N_PROMPT, 1, &error) == 0) { /* k and v of token 0 once more */
            (void)printf("decode step:        %g (expected 2.2)\n", (double)out[0][0][0]);
        }
        (void)fovea_close_session(client, &session, 0, NULL);
    }
    fovea_close(client);
    if (error.code != FOVEA_OK) {
        (void)fprintf(stderr, "%s: %s\n", fovea_code_name(error.code), error.message);
        return 1;
    }
    return 0;
}
