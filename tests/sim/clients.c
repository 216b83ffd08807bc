/*
 * clients.c - clients that append, repeat, err, fork, cut, cancel and come again, each with a model of its sessions.
 *
 * A client does one thing at a time, and again until it has an answer it can rely on. After UNAVAILABLE, or when it left in
 * the middle, the service may have done it or not: then it asks (GetSession), and the answer must be one of the two. Whatever
 * else is answered must be what the model says, and a refusal changes nothing.
 */
#include "common/tensor.h"
#include "tests/sim/job.h"

#include <stdlib.h>
#include <string.h>

#define CLIENTS_MAX  6
#define SESSIONS_MAX 5
#define LAYERS       2
#define MODELS_MAX   8
#define LOG_MAX      64
#define ITEMS_MAX    2
#define TOKENS_MAX   150
#define N_Q_HEADS    4
#define N_KV_HEADS   2
#define HEAD_DIM     16
#define SETTLED_US \
    (15 * SIM_SECOND) /* whatever was sent before has been done by then, or never will be */

enum {
    OK = 0,
    CANCELLED = 1,
    DEADLINE = 4,
    NOT_FOUND = 5,
    EXHAUSTED = 8,
    PRECONDITION = 9,
    OUT_OF_RANGE = 11,
    UNAVAILABLE = 14,
    DATA_LOSS = 15,
};

typedef struct layer {
    uint64_t n_tokens;
    struct {
        uint64_t position;
        uint32_t n_tokens;
        uint8_t fill;
    } log[LOG_MAX];
    uint32_t n_log;
} layer_t;

typedef struct session {
    bool is_open;
    int model;
    fv_session_id_t id;
    layer_t layers[LAYERS];
} session_t;

typedef enum kind {
    OP_REGISTER,
    OP_OPEN,
    OP_ATTEND,
    OP_FORK,
    OP_TRUNCATE,
    OP_CLOSE,
    OP_GET,
} kind_t;

typedef struct operation {
    kind_t kind;
    int session, child; /* child: where a fork goes */
    int model;
    uint32_t layer;
    bool append, is_stream;
    uint32_t n_items;
    struct {
        int session;
        uint64_t position;
        uint32_t n_tokens;
        uint8_t fill;
    } items[ITEMS_MAX];
    uint64_t position;
    int expected;
    bool is_unsure; /* it was sent before, and may have been done */
} operation_t;

typedef struct client {
    uint32_t number;
    session_t sessions[SESSIONS_MAX];
    operation_t op;
    int asks; /* of the operation's sessions that are asked about: next one; -1: none */
    uint64_t tag, handle;
    uint32_t n_left;
    uint8_t next_fill;
    bool is_done, is_closing;
} client_t;

static struct {
    client_t clients[CLIENTS_MAX];
    uint32_t n;
    char model_ids[MODELS_MAX][FV_MODEL_ID_BYTES];
    int models[MODELS_MAX], n_models; /* those that are there */
} c;

sim_counts_t g_sim_counts;

static void next(client_t *client);
static void send(client_t *client);

/* ------------------------------------------------------------------ the model */

static uint64_t longest(const session_t *s)
{
    return (s->layers[0].n_tokens > s->layers[1].n_tokens) ? s->layers[0].n_tokens
                                                           : s->layers[1].n_tokens;
}

static void cut(session_t *s, uint64_t position)
{
    for (int i = 0; i < LAYERS; i++) {
        layer_t *l = &s->layers[i];
        l->n_tokens = (l->n_tokens < position) ? l->n_tokens : position;
        while ((l->n_log > 0) &&
               (l->log[l->n_log - 1U].position + l->log[l->n_log - 1U].n_tokens > l->n_tokens)) {
            l->n_log--;
        }
    }
}

/* What the model says of an item. */
static int expect_item(const client_t *client, uint32_t i)
{
    const operation_t *op = &client->op;
    const layer_t *l = &client->sessions[op->items[i].session].layers[op->layer];

    if (op->items[i].position > l->n_tokens) {
        return OUT_OF_RANGE;
    }
    if (!op->append || (op->items[i].position == l->n_tokens)) {
        return OK;
    }
    for (uint32_t k = 0; k < l->n_log; k++) {
        if ((l->log[k].position == op->items[i].position) &&
            (l->log[k].n_tokens == op->items[i].n_tokens) &&
            (l->log[k].fill == op->items[i].fill)) {
            return OK;
        }
    }
    return PRECONDITION;
}

/* Whether the operation appends anything. */
static bool appends(const client_t *client, uint32_t i)
{
    const operation_t *op = &client->op;

    return op->append && (op->items[i].position ==
                          client->sessions[op->items[i].session].layers[op->layer].n_tokens);
}

static void apply_attend(client_t *client)
{
    const operation_t *op = &client->op;

    for (uint32_t i = 0; i < op->n_items; i++) {
        layer_t *l = &client->sessions[op->items[i].session].layers[op->layer];
        if (!appends(client, i)) {
            continue;
        }
        FV_ASSERT(l->n_log < LOG_MAX);
        l->log[l->n_log].position = op->items[i].position;
        l->log[l->n_log].n_tokens = op->items[i].n_tokens;
        l->log[l->n_log++].fill = op->items[i].fill;
        l->n_tokens += op->items[i].n_tokens;
    }
}

/* It has been done. */
static void apply(client_t *client)
{
    operation_t *op = &client->op;
    session_t *s = &client->sessions[op->session];

    if (op->kind == OP_ATTEND) {
        apply_attend(client);
    } else if (op->kind == OP_TRUNCATE) {
        cut(s, op->position);
    } else if (op->kind == OP_CLOSE) {
        s->is_open = false;
    }
}

/* ------------------------------------------------------------------ operations */

static int pick_session(const client_t *client, bool is_open)
{
    int first = (int)sim_pick(0, SESSIONS_MAX - 1);

    for (int i = 0; i < SESSIONS_MAX; i++) {
        int k = (first + i) % SESSIONS_MAX;
        if (client->sessions[k].is_open == is_open) {
            return k;
        }
    }
    return -1;
}

static void add_item(client_t *client, int session)
{
    operation_t *op = &client->op;
    const layer_t *l = &client->sessions[session].layers[op->layer];
    int64_t dice = sim_pick(0, 19);
    uint32_t i = op->n_items++;

    op->items[i].session = session;
    op->items[i].fill = client->next_fill++;
    op->items[i].n_tokens = (uint32_t)(sim_chance(3) ? sim_pick(1, TOKENS_MAX) : sim_pick(1, 3));
    op->items[i].position = l->n_tokens;
    if ((dice < 3) && (l->n_log > 0)) { /* once more, or with other bytes */
        uint32_t k = (uint32_t)sim_pick(0, (int64_t)l->n_log - 1);
        op->items[i].position = l->log[k].position;
        op->items[i].n_tokens = l->log[k].n_tokens;
        op->items[i].fill = (uint8_t)(l->log[k].fill + ((dice == 0) ? 1U : 0U));
    } else if (dice == 3) {
        op->items[i].position = l->n_tokens + (uint64_t)sim_pick(1, 3);
    }
}

static void make_attend(client_t *client, int session)
{
    operation_t *op = &client->op;
    int other = pick_session(client, true);

    *op = (operation_t){.kind = OP_ATTEND,
                        .layer = (uint32_t)sim_pick(0, LAYERS - 1),
                        .append = !sim_chance(8),
                        .is_stream = sim_chance(2)};
    if (client->sessions[session].layers[op->layer].n_log == LOG_MAX) {
        op->append = false;
    }
    add_item(client, session);
    if (sim_chance(3) && (other != session) && (other >= 0) &&
        (client->sessions[other].model == client->sessions[session].model) &&
        (client->sessions[other].layers[op->layer].n_log < LOG_MAX)) {
        add_item(client, other);
    }
    for (uint32_t i = 0; (i < op->n_items) && (op->expected == OK); i++) {
        op->expected = expect_item(client, i);
    }
}

static void make_fork(client_t *client, int session)
{
    int child = pick_session(client, false);
    uint64_t n = longest(&client->sessions[session]);

    if (child < 0) {
        make_attend(client, session);
        return;
    }
    client->op = (operation_t){.kind = OP_FORK, .session = session, .child = child};
    client->op.position = (uint64_t)sim_pick(0, (int64_t)n + (sim_chance(6) ? 2 : 0));
    client->op.expected = (client->op.position > n) ? OUT_OF_RANGE : OK;
}

static void make_truncate(client_t *client, int session)
{
    uint64_t n = longest(&client->sessions[session]);

    client->op = (operation_t){.kind = OP_TRUNCATE, .session = session};
    client->op.position = (uint64_t)sim_pick(0, (int64_t)n + (sim_chance(6) ? 2 : 0));
    client->op.expected = (client->op.position > n) ? OUT_OF_RANGE : OK;
}

static void make_operation(client_t *client)
{
    int64_t dice = sim_pick(0, 99);
    int session = pick_session(client, true);

    if ((c.n_models == 0) || ((dice > 96) && !client->is_closing)) {
        client->op = (operation_t){.kind = OP_REGISTER, .model = (int)sim_pick(0, MODELS_MAX - 1)};
    } else if (client->is_closing) {
        client->op = (operation_t){.kind = OP_CLOSE, .session = session};
    } else if ((session < 0) || ((dice < 10) && (pick_session(client, false) >= 0))) {
        client->op = (operation_t){.kind = OP_OPEN,
                                   .session = pick_session(client, false),
                                   .model = c.models[sim_pick(0, c.n_models - 1)]};
    } else if (dice < 20) {
        make_fork(client, session);
    } else if (dice < 28) {
        make_truncate(client, session);
    } else if (dice < 33) {
        client->op = (operation_t){.kind = OP_CLOSE, .session = session};
    } else if (dice < 45) {
        client->op = (operation_t){.kind = OP_GET, .session = session};
    } else {
        make_attend(client, session);
    }
}

/* ------------------------------------------------------------------ messages */

static void encode_attend(const client_t *client, fv_bytes_t *out)
{
    const operation_t *op = &client->op;
    fv_attend_item_t items[ITEMS_MAX];
    fv_attend_request_t request = {.request_id = client->tag,
                                   .layer = op->layer,
                                   .n_items = op->n_items,
                                   .dtype = FV_DTYPE_BF16,
                                   .causal = true,
                                   .append = op->append};
    fv_bytes_t head = {0};
    fv_wire_tensor_heads_t heads;

    for (uint32_t i = 0; i < op->n_items; i++) {
        items[i] = (fv_attend_item_t){.session = client->sessions[op->items[i].session].id,
                                      .position = op->items[i].position,
                                      .n_tokens = op->items[i].n_tokens};
        request.n_tokens += op->items[i].n_tokens;
    }
    size_t q_bytes = request.n_tokens * N_Q_HEADS * HEAD_DIM * 2U;
    size_t kv_bytes = op->append ? (request.n_tokens * N_KV_HEADS * HEAD_DIM * 2U) : 0U;
    FV_ASSERT(fv_wire_attend_request_encode(&request, items, q_bytes, kv_bytes, kv_bytes, &head,
                                            &heads) == FV_OK);
    uint8_t *data = malloc(head.n_bytes + 48U + q_bytes + 2U * kv_bytes);
    FV_ASSERT(data != NULL);
    memcpy(data, head.data, head.n_bytes);
    out->data = data;
    out->n_bytes = head.n_bytes;
    free(head.data);
    const uint8_t *const tensor_heads[3] = {heads.q, heads.k, heads.v};
    const size_t n_heads[3] = {heads.n_q, heads.n_k, heads.n_v};
    const size_t n_tensors[3] = {q_bytes, kv_bytes, kv_bytes};
    for (int t = 0; t < 3; t++) {
        if (n_tensors[t] == 0U) {
            continue;
        }
        memcpy(data + out->n_bytes, tensor_heads[t], n_heads[t]);
        out->n_bytes += n_heads[t];
        for (uint32_t i = 0; i < op->n_items; i++) {
            size_t n = n_tensors[t] / request.n_tokens * op->items[i].n_tokens;
            memset(data + out->n_bytes, op->items[i].fill, n);
            out->n_bytes += n;
        }
    }
}

static fv_status_t encode(const client_t *client, fv_method_t *out_method, fv_bytes_t *out)
{
    const operation_t *op = &client->op;
    bool is_asking = client->asks >= 0;
    int session = is_asking ? client->asks : op->session;
    fv_session_request_t request = {
        .session = client->sessions[session].id, .position = op->position, .has_position = true};
    fv_open_request_t open = {0};
    fv_model_spec_t spec = {.name = "sim",
                            .n_layers = LAYERS,
                            .n_q_heads = N_Q_HEADS,
                            .n_kv_heads = N_KV_HEADS,
                            .head_dim_qk = HEAD_DIM,
                            .kv_dtype = FV_DTYPE_BF16,
                            .n_policies = 1};

    switch (is_asking ? OP_GET : op->kind) {
    case OP_REGISTER:
        *out_method = FV_METHOD_REGISTER_MODEL;
        spec.name[3] = (char)('0' + op->model);
        return fv_wire_register_request_encode(&spec, out);
    case OP_OPEN:
        *out_method = FV_METHOD_OPEN_SESSION;
        memcpy(open.model_id, c.model_ids[op->model], sizeof(open.model_id));
        open.max_tokens_hint = (uint64_t)sim_pick(0, 500);
        open.sharding = (fv_sharding_t){.mode = (int32_t)sim_pick(0, 2), .is_set = 1};
        return fv_wire_open_request_encode(&open, out);
    case OP_FORK:
        *out_method = FV_METHOD_FORK_SESSION;
        return fv_wire_fork_request_encode(&request, out);
    case OP_TRUNCATE:
        *out_method = FV_METHOD_TRUNCATE_SESSION;
        return fv_wire_truncate_request_encode(&request, out);
    case OP_CLOSE:
        *out_method = FV_METHOD_CLOSE_SESSION;
        return fv_wire_close_request_encode(&request, out);
    case OP_GET:
        *out_method = FV_METHOD_GET_SESSION;
        return fv_wire_get_request_encode(&request, out);
    case OP_ATTEND:
    default:
        *out_method = op->is_stream ? FV_METHOD_ATTEND : FV_METHOD_ATTEND_ONCE;
        encode_attend(client, out);
        return FV_OK;
    }
}

/* ------------------------------------------------------------------ answers */

static void on_answer(void *arg, uint64_t tag, const sim_answer_t *answer);

static void later(void *a, uint64_t tag)
{
    client_t *client = a;

    if (client->tag == tag) {
        send(client);
    }
}

static void wait_and_send(client_t *client)
{
    client->tag++;
    sim_at(sim_now_us() + sim_pick(5000, 200000), later, client, client->tag);
}

static void finish(client_t *client)
{
    client->asks = -1;
    g_sim_counts.n_operations++;
    next(client);
}

/* Of the operation's sessions that may have changed, the one after `before`. */
static int next_to_ask(const client_t *client, int before)
{
    const operation_t *op = &client->op;

    if (op->kind != OP_ATTEND) {
        return (before < 0) ? op->session : -1;
    }
    for (uint32_t i = 0; i < op->n_items; i++) {
        if ((before < 0) || ((i > 0) && (op->items[i - 1U].session == before))) {
            return op->items[i].session;
        }
    }
    return -1;
}

/* It was done, or it was not. */
static void ask(client_t *client)
{
    client->asks = next_to_ask(client, -1);
    client->tag++;
    sim_at(sim_now_us() + SETTLED_US, later, client, client->tag);
}

static void lose(client_t *client, int session, const sim_answer_t *answer)
{
    if (!sim_job_may_lose()) {
        sim_fail("client %u: a session is lost, and nothing is: %s", client->number, answer->text);
    }
    client->sessions[session].is_open = false;
    g_sim_counts.n_lost++;
}

/* What a session may look like after an operation that was done, or was not. */
static void compare(client_t *client, int session, const fv_session_info_t *info)
{
    session_t before = client->sessions[session];
    session_t *s = &client->sessions[session];
    bool is_before = true;
    bool is_after = true;

    FV_ASSERT(info->n_layers == LAYERS);
    for (int i = 0; i < LAYERS; i++) {
        is_before = is_before && (info->layer_tokens[i] == s->layers[i].n_tokens);
    }
    if ((client->asks >= 0) && (client->op.expected == OK)) {
        operation_t whole = client->op;
        for (uint32_t i = 0; i < client->op.n_items; i++) { /* this session's part alone */
            if (client->op.items[i].session == session) {
                client->op.items[0] = client->op.items[i];
            }
        }
        client->op.n_items = (whole.n_items > 0) ? 1U : 0U;
        apply(client);
        client->op = whole;
    }
    for (int i = 0; i < LAYERS; i++) {
        is_after = is_after && (info->layer_tokens[i] == s->layers[i].n_tokens);
    }
    if (!is_before && !is_after) {
        sim_fail("client %u: a session has %llu and %llu tokens, expected %llu and %llu%s",
                 client->number, (unsigned long long)info->layer_tokens[0],
                 (unsigned long long)info->layer_tokens[1],
                 (unsigned long long)before.layers[0].n_tokens,
                 (unsigned long long)before.layers[1].n_tokens,
                 (client->asks >= 0) ? ", or what was asked for" : "");
    }
    if (!is_after) {
        *s = before;
    }
}

/* The answer to GetSession. */
static void take_info(client_t *client, const sim_answer_t *answer)
{
    bool is_asking = client->asks >= 0;
    int session = is_asking ? client->asks : client->op.session;
    fv_session_info_t info;

    if (answer->code == UNAVAILABLE) {
        wait_and_send(client);
        return;
    }
    if ((answer->code == NOT_FOUND) && is_asking && (client->op.kind == OP_CLOSE)) {
        apply(client);
    } else if ((answer->code == NOT_FOUND) || (answer->code == DATA_LOSS)) {
        lose(client, session, answer);
    } else if (answer->code != OK) {
        sim_fail("client %u: GetSession answers %d: %s", client->number, answer->code,
                 answer->text);
    } else {
        FV_ASSERT(fv_wire_session_info_decode(
                      (fv_span_t){.data = answer->data, .n_bytes = answer->n_bytes}, &info) ==
                  FV_OK);
        if (is_asking && (client->op.kind == OP_CLOSE)) {
            info.n_layers = LAYERS; /* it is there: it was not closed */
        } else {
            compare(client, session, &info);
        }
        fv_session_info_free(&info);
    }
    client->asks = is_asking ? next_to_ask(client, session) : -1;
    if (client->asks >= 0) {
        wait_and_send(client);
    } else {
        finish(client);
    }
}

static void take_id(client_t *client, const sim_answer_t *answer)
{
    operation_t *op = &client->op;
    fv_span_t span = {.data = answer->data, .n_bytes = answer->n_bytes};
    session_t *s = &client->sessions[(op->kind == OP_FORK) ? op->child : op->session];

    if (op->kind == OP_REGISTER) {
        fv_register_response_t response;
        FV_ASSERT(fv_wire_register_response_decode(span, &response) == FV_OK);
        if (c.model_ids[op->model][0] == '\0') {
            c.models[c.n_models++] = op->model;
            memcpy(c.model_ids[op->model], response.model_id, sizeof(c.model_ids[0]));
        } else if (strcmp(c.model_ids[op->model], response.model_id) != 0) {
            sim_fail("a model has two ids, %s and %s", c.model_ids[op->model], response.model_id);
        }
        return;
    }
    if (op->kind == OP_FORK) {
        *s = client->sessions[op->session];
        cut(s, op->position);
        FV_ASSERT(fv_wire_fork_response_decode(span, &s->id) == FV_OK);
    } else {
        memset(s, 0, sizeof(*s));
        s->model = op->model;
        FV_ASSERT(fv_wire_open_response_decode(span, &s->id) == FV_OK);
    }
    s->is_open = true;
}

/* A refusal of something that was sent for the first time; or the second refusal of what was refused before. */
static void take_refusal(client_t *client, const sim_answer_t *answer)
{
    operation_t *op = &client->op;
    bool is_gone = (answer->code == NOT_FOUND) || (answer->code == DATA_LOSS);

    if (is_gone && (op->kind == OP_CLOSE) && op->is_unsure) {
        apply(client);
        finish(client);
    } else if (is_gone && sim_job_may_lose()) {
        int session = (op->kind == OP_ATTEND) ? -1 : op->session;
        if (session < 0) { /* which of them is asked */
            op->expected = OK;
            ask(client);
            return;
        }
        lose(client, session, answer);
        finish(client);
    } else if ((answer->code == op->expected) || ((op->kind == OP_ATTEND) && (op->n_items > 1U) &&
                                                  (answer->code == expect_item(client, 1)))) {
        g_sim_counts.n_refused++;
        finish(client);
    } else if ((answer->code == EXHAUSTED) && (op->expected == OK)) {
        g_sim_counts.n_exhausted++;
        if (op->is_unsure && (op->kind != OP_OPEN) && (op->kind != OP_FORK)) {
            ask(client);
        } else {
            finish(client);
        }
    } else {
        sim_fail("client %u: operation %d answers %d, expected %d: %s", client->number,
                 (int)op->kind, answer->code, op->expected, answer->text);
    }
}

/* Of Attend on a stream the answer is in the message. */
static sim_answer_t unwrap(const client_t *client, const sim_answer_t *answer)
{
    sim_answer_t inner = *answer;
    fv_span_t span = {.data = answer->data, .n_bytes = answer->n_bytes};
    fv_attend_response_view_t view;

    if ((answer->code == OK) && (client->op.kind == OP_ATTEND) && (client->asks < 0)) {
        FV_ASSERT(fv_wire_attend_response_scan(&span, 1, &view) == FV_OK);
        if (view.request_id != client->tag) {
            sim_fail("client %u: the answer of request %llu, expected %llu", client->number,
                     (unsigned long long)view.request_id, (unsigned long long)client->tag);
        }
        inner.code = view.code;
        memcpy(inner.text, view.message, sizeof(inner.text));
    }
    return inner;
}

static void on_answer(void *arg, uint64_t tag, const sim_answer_t *wrapped)
{
    client_t *client = arg;
    sim_answer_t answer = unwrap(client, wrapped);
    operation_t *op = &client->op;

    FV_ASSERT(tag == client->tag);
    if ((client->asks >= 0) || (op->kind == OP_GET)) {
        take_info(client, &answer);
    } else if (answer.code == UNAVAILABLE) {
        op->is_unsure = true;
        g_sim_counts.n_retries++;
        wait_and_send(client);
    } else if (answer.code != OK) {
        take_refusal(client, &answer);
    } else if (op->expected != OK) {
        sim_fail("client %u: operation %d is done, expected %d", client->number, (int)op->kind,
                 op->expected);
    } else {
        g_sim_counts.n_served++;
        if ((op->kind == OP_REGISTER) || (op->kind == OP_OPEN) || (op->kind == OP_FORK)) {
            take_id(client, &answer);
        } else {
            apply(client);
        }
        finish(client);
    }
}

/* The client leaves in the middle, and comes back with the same: what it left may be done before, and not after. */
static void vanish(void *a, uint64_t tag)
{
    client_t *client = a;

    if ((client->tag != tag) || (client->asks >= 0) || client->is_done) {
        return;
    }
    g_sim_counts.n_cancelled++;
    sim_door_cancel(client->handle);
    if ((client->op.kind == OP_OPEN) || (client->op.kind == OP_FORK)) {
        finish(client); /* a session that nobody knows is closed at the end */
        return;
    }
    client->op.is_unsure = true;
    wait_and_send(client);
}

static void send(client_t *client)
{
    fv_method_t method = FV_METHOD_GET_SESSION;
    fv_bytes_t bytes = {0};

    client->tag++;
    FV_ASSERT(encode(client, &method, &bytes) == FV_OK);
    sim_caller_t caller = {.on_answer = on_answer,
                           .arg = client,
                           .tag = client->tag,
                           .principal = client->number % SIM_PRINCIPALS};
    client->handle = sim_door_send(method, bytes.data, bytes.n_bytes, &caller);
    free(bytes.data);
    if (sim_chance(12) && !client->is_closing) {
        sim_at(sim_now_us() + sim_pick(0, 8000), vanish, client, client->tag);
    }
}

static void begin_next(void *a, uint64_t tag)
{
    client_t *client = a;

    if (client->tag == tag) {
        make_operation(client);
        send(client);
    }
}

static void next(client_t *client)
{
    client->tag++;
    if ((client->n_left == 0) && !client->is_closing) {
        client->is_closing = true;
    } else if (!client->is_closing) {
        client->n_left--;
    }
    if (client->is_closing && (pick_session(client, true) < 0)) {
        client->is_done = true;
        return;
    }
    sim_at(sim_now_us() + (sim_chance(4) ? sim_pick(0, 60000) : sim_pick(0, 500)), begin_next,
           client, client->tag);
}

/* ------------------------------------------------------------------ */

void sim_clients_begin(uint32_t n, uint32_t n_operations)
{
    memset(&c, 0, sizeof(c));
    c.n = n;
    for (uint32_t i = 0; i < n; i++) {
        c.clients[i].number = i;
        c.clients[i].asks = -1;
        c.clients[i].n_left = n_operations;
        next(&c.clients[i]);
    }
}

bool sim_clients_are_done(void)
{
    for (uint32_t i = 0; i < c.n; i++) {
        if (!c.clients[i].is_done) {
            return false;
        }
    }
    return true;
}
