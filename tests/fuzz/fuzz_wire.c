/*
 * fuzz_wire.c - any bytes through every decoder.
 *
 * Input: byte 0 picks the message; for the two attend messages bytes 1..4 are sizes of pieces, the rest is the
 *        message, otherwise all the rest is the message.
 * Checks: attend messages against protobuf-c (wire_oracle.h); for the others, that what was read can be
 *         written and read again; that each refusal has a text.
 */
#include "proto/wire.h"
#include "tests/fuzz/wire_oracle.h"

#include <stdio.h>
#include <stdlib.h>

#define N_CUTS 4

/* NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void check(bool ok, const char *what)
{
    if (!ok) {
        (void)fprintf(stderr, "fuzz_wire: %s (%s)\n", what, fv_error_context());
        abort();
    }
}

#define NOTHING_TO_FREE(value) ((void)(value))

/* Reads, writes what was read, and reads that. */
#define DECODER(name, type, release)                                                    \
    static void run_##name(fv_span_t in)                                                \
    {                                                                                   \
        static type first;                                                              \
        static type again;                                                              \
        fv_bytes_t bytes;                                                               \
                                                                                        \
        if (fv_wire_##name##_decode(in, &first) != FV_OK) {                             \
            check(fv_error_context()[0] != '\0', #name ": refused without a text");     \
            return;                                                                     \
        }                                                                               \
        check(fv_wire_##name##_encode(&first, &bytes) == FV_OK, #name ": not written"); \
        fv_span_t span = {.data = bytes.data, .n_bytes = bytes.n_bytes};                \
        check(fv_wire_##name##_decode(span, &again) == FV_OK, #name ": not read back"); \
        fv_bytes_free(&bytes);                                                          \
        release(&first);                                                                \
        release(&again);                                                                \
    }

DECODER(register_response, fv_register_response_t, NOTHING_TO_FREE)
DECODER(open_request, fv_open_request_t, NOTHING_TO_FREE)
DECODER(open_response, fv_session_id_t, NOTHING_TO_FREE)
DECODER(fork_request, fv_session_request_t, NOTHING_TO_FREE)
DECODER(fork_response, fv_session_id_t, NOTHING_TO_FREE)
DECODER(truncate_request, fv_session_request_t, NOTHING_TO_FREE)
DECODER(close_request, fv_session_request_t, NOTHING_TO_FREE)
DECODER(get_request, fv_session_request_t, NOTHING_TO_FREE)
DECODER(session_info, fv_session_info_t, fv_session_info_free)
DECODER(list_request, fv_list_request_t, NOTHING_TO_FREE)
DECODER(list_response, fv_list_response_t, fv_list_response_free)
DECODER(cluster_status, fv_cluster_status_t, fv_cluster_status_free)
DECODER(placement_request, fv_session_request_t, NOTHING_TO_FREE)
DECODER(placement, fv_placement_info_t, fv_placement_info_free)
DECODER(watch_request, uint32_t, NOTHING_TO_FREE)
DECODER(drain_request, uint32_t, NOTHING_TO_FREE)
DECODER(drain_response, fv_drain_response_t, NOTHING_TO_FREE)
DECODER(register_request, fv_model_spec_t, NOTHING_TO_FREE)

/* A spec that passes the check has a policy for every layer. */
static void run_model(fv_span_t in)
{
    static fv_model_spec_t spec;

    run_register_request(in);
    if ((fv_wire_register_request_decode(in, &spec) == FV_OK) &&
        (fv_model_spec_check(&spec) == FV_OK)) {
        for (int32_t i = 0; i < spec.n_layers; i++) {
            check(spec.layer_policy[i] < spec.n_policies, "layer without a policy");
        }
        check(fv_model_group(&spec) <= FV_GROUP_MAX, "group too large");
    }
}

static void (*const k_decoders[])(fv_span_t in) = {
    run_model,          run_register_response, run_open_request,     run_open_response,
    run_fork_request,   run_fork_response,     run_truncate_request, run_close_request,
    run_get_request,    run_session_info,      run_list_request,     run_list_response,
    run_cluster_status, run_placement_request, run_placement,        run_watch_request,
    run_drain_request,  run_drain_response,
};
#define N_DECODERS (sizeof(k_decoders) / sizeof(k_decoders[0]))

static void run_attend(const uint8_t *data, size_t n_bytes, bool is_request)
{
    size_t cuts[N_CUTS];

    if (n_bytes < N_CUTS) {
        return;
    }
    for (size_t i = 0; i < N_CUTS; i++) {
        cuts[i] = data[i];
    }
    data += N_CUTS;
    n_bytes -= N_CUTS;
    fv_pieces_t pieces = fv_pieces_cut(data, n_bytes, cuts, N_CUTS);
    const char *error = is_request ? fv_oracle_request(data, n_bytes, pieces, false)
                                   : fv_oracle_response(data, n_bytes, pieces);
    fv_pieces_free(&pieces);
    check(error == NULL, error);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    if (n_bytes == 0) {
        return 0;
    }
    size_t which = data[0] % (N_DECODERS + 2U);
    if (which < 2) {
        run_attend(data + 1, n_bytes - 1U, which == 0);
    } else {
        k_decoders[which - 2U]((fv_span_t){.data = data + 1, .n_bytes = n_bytes - 1U});
    }
    return 0;
}
