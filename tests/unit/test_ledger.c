/*
 * test_ledger.c - what the coordinator's journal gives back, also where it is damaged.
 *
 * Goal:   a session that comes back has appends of its own, as many as it had at some time, never another's; one that does not
 *         is known to be lost, with its owner.
 * Method: a ledger of a few sessions, of which two have the same slot one after the other, is damaged: every record's body,
 *         and every run of records' heads. Every append has a digest of its own, so that whose it is can be told.
 */
#include "coord/ledger.h"
#include "coord/lost.h"
#include "tests/support/journal_file.h"
#include "tests/support/sched_case.h"
#include "tests/support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define N_TOKENS \
    10U /* of every append: a mix of two sessions' appends would fit by its positions */
#define APPENDS_MAX 8U
#define RECORDS_MAX 64U

enum {
    FIRST,
    OTHER,
    FORK,
    SECOND,
    N_SESSIONS
}; /* SECOND has FIRST's slot */

/* Some records, by their number in the journal. */
enum {
    OPENS_OTHER = 3,
    OPENS_FORK = 5,
    OPENS_SECOND = 7,
    N_RECORDS = 14
};

/* What there was of a session. */
typedef struct truth {
    fv_session_id_t id;
    uint32_t digests[APPENDS_MAX];
    uint32_t n;
    bool is_closed;
} truth_t;

static char g_dir[64];
static fv_store_place_t g_place;
static fv_principal_t g_owner = {.name = "tenant"};

static int make_folder(void **state)
{
    (void)state;
    (void)snprintf(g_dir, sizeof(g_dir), "/tmp/fv_ledger_XXXXXX");
    return ((mkdtemp(g_dir) != NULL) &&
            (fv_store_place_make(g_dir, "unit", 0, 1, &g_place) == FV_OK))
               ? 0
               : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    (void)rmdir(g_dir); /* empty, if a test did not fail */
    return 0;
}

static fv_principal_t *owner_of(void *arg, const char *name)
{
    (void)arg;
    assert_string_equal(name, g_owner.name);
    return &g_owner;
}

/* ------------------------------------------------------------------ writing */

static void append(fv_ledger_t *ledger, fv_session_t *session, truth_t *truth)
{
    static uint32_t s_digest = 100;
    fv_case_request_t *r = fv_case_request(0, true);
    const fv_step_plan_t plan = {.joined = &r->request, .n_joined = 1, .n_items = 1};

    s_digest++;
    fv_case_add(r, session->id, (uint64_t)truth->n * N_TOKENS, N_TOKENS, s_digest);
    r->sessions[0] = session;
    r->ctl_items[0].flags = FV_ITEM_APPEND;
    r->request.n_tokens_piece = N_TOKENS; /* all of it */
    assert_int_equal(fv_ledger_reserve(ledger), FV_OK);
    assert_int_equal(fv_ledger_note_step(ledger, &plan), FV_OK);
    free(r);
    assert_true(truth->n < APPENDS_MAX);
    truth->digests[truth->n++] = s_digest;
}

static fv_session_t *
open_session(fv_ledger_t *ledger, fv_sched_t *sched, const char *model_id, truth_t *truth)
{
    truth->id = fv_case_open(sched, model_id, NULL);
    fv_session_t *session = fv_sched_session(sched, &truth->id);
    session->owner = &g_owner;
    assert_int_equal(fv_ledger_note_session(ledger, session, NULL, 0), FV_OK);
    return session;
}

static fv_session_t *
fork_session(fv_ledger_t *ledger, fv_sched_t *sched, fv_session_t *parent, truth_t *truth)
{
    fv_birth_t birth = {.id = {{0xf0}}};
    fv_ctl_fork_t message;
    fv_placement_t placement;

    assert_int_equal(fv_sched_fork(sched, &parent->id, UINT64_MAX, &birth, &message, &placement),
                     FV_OK);
    assert_memory_equal(&message.id, &birth.id, sizeof(birth.id));
    fv_session_t *child = fv_sched_session(sched, &birth.id);
    assert_ptr_equal(child->owner, &g_owner);
    assert_int_equal(fv_ledger_note_session(ledger, child, parent, UINT64_MAX), FV_OK);
    truth->id = birth.id;
    return child;
}

/* A journal of four sessions: model, FIRST and 1 append, OTHER and 1, FORK, CLOSE, SECOND and 4, FORK's, OTHER's. */
static void write_ledger(truth_t truth[N_SESSIONS])
{
    fv_sched_t *sched = fv_case_sched(1, 64, 1U << 20U);
    fv_model_spec_t spec = fv_case_spec("ledger");
    char model_id[FV_MODEL_ID_BYTES];
    fv_ledger_t *ledger = NULL;
    fv_ctl_close_t message;
    fv_placement_t placement;

    memset(truth, 0, N_SESSIONS * sizeof(*truth));
    fv_case_register(sched, &spec, model_id);
    fv_sched_own_model(sched, 0, &g_owner);
    assert_int_equal(fv_ledger_open(&g_place, &ledger), FV_OK);
    assert_int_equal(fv_ledger_note_model(ledger, sched, 0), FV_OK);
    fv_session_t *first = open_session(ledger, sched, model_id, &truth[FIRST]);
    append(ledger, first, &truth[FIRST]);
    fv_session_t *other = open_session(ledger, sched, model_id, &truth[OTHER]);
    append(ledger, other, &truth[OTHER]);
    fv_session_t *child = fork_session(ledger, sched, first, &truth[FORK]);
    memcpy(truth[FORK].digests, truth[FIRST].digests, sizeof(truth[FORK].digests));
    truth[FORK].n = truth[FIRST].n;
    uint32_t slot = first->slot;
    assert_int_equal(fv_ledger_note_close(ledger, first), FV_OK);
    truth[FIRST].is_closed = true;
    assert_int_equal(fv_sched_close(sched, &truth[FIRST].id, &message, &placement), FV_OK);
    fv_session_t *second = open_session(ledger, sched, model_id, &truth[SECOND]);
    assert_int_equal(second->slot, slot);
    for (uint32_t i = 0; i < 4U; i++) {
        append(ledger, second, &truth[SECOND]);
    }
    append(ledger, child, &truth[FORK]);
    append(ledger, other, &truth[OTHER]);
    fv_ledger_close(ledger);
    fv_sched_destroy(sched);
}

/* ------------------------------------------------------------------ reading */

/* What a load gave. */
typedef struct found {
    uint32_t n_kept, n_lost, n_unknown; /* of those that were open in the end */
    bool has_holes;
} found_t;

/* Its appends are the first of its own. Shorter than in the end: only where the ranks are asked for exact lengths. */
static void check_kept(const truth_t *truth, const fv_session_t *session, bool has_holes)
{
    const fv_layer_t *layer = &session->layers[0];

    assert_true(layer->n_records <= truth->n);
    assert_int_equal(layer->n_tokens, (uint64_t)layer->n_records * N_TOKENS);
    assert_ptr_equal(session->owner, &g_owner);
    for (uint32_t i = 0; i < layer->n_records; i++) {
        assert_int_equal(layer->records[i].digest, truth->digests[i]);
        assert_int_equal(layer->records[i].position, (uint64_t)i * N_TOKENS);
    }
    if (!has_holes) {
        assert_int_equal(layer->n_records, truth->n);
    }
}

static found_t load(const truth_t truth[N_SESSIONS])
{
    fv_sched_t *sched = fv_case_sched(1, 64, 1U << 20U);
    fv_ledger_t *ledger = NULL;
    fv_lost_t *lost = NULL;
    found_t found = {0};

    assert_int_equal(fv_lost_create(&lost), FV_OK);
    assert_int_equal(fv_ledger_open(&g_place, &ledger), FV_OK);
    assert_int_equal(fv_ledger_load(ledger, sched, owner_of, NULL, lost, &found.has_holes), FV_OK);
    for (uint32_t i = 0; i < N_SESSIONS; i++) {
        const fv_session_t *session = fv_sched_session(sched, &truth[i].id);
        const fv_lost_session_t *loss = fv_lost_find(lost, &truth[i].id);
        assert_true((session == NULL) || (loss == NULL));
        if (session != NULL) {
            check_kept(&truth[i], session, found.has_holes);
        }
        if (loss != NULL) {
            assert_int_equal(loss->rank, FV_LOST_RECORDS);
            assert_ptr_equal(loss->owner, &g_owner);
        }
        if (!truth[i].is_closed) {
            found.n_kept += (session != NULL) ? 1U : 0U;
            found.n_lost += (loss != NULL) ? 1U : 0U;
            found.n_unknown += ((session == NULL) && (loss == NULL)) ? 1U : 0U;
        }
    }
    fv_lost_destroy(lost);
    fv_ledger_close(ledger);
    fv_sched_destroy(sched);
    return found;
}

typedef struct fixture {
    truth_t truth[N_SESSIONS];
    char path[FV_STORE_PATH_BYTES];
    uint8_t whole[1 << 21], damaged[1 << 21];
    size_t n_bytes, n_records, at[RECORDS_MAX];
} fixture_t;

static fixture_t g_fix;

static void make_fixture(void)
{
    fixture_t *f = &g_fix;

    write_ledger(f->truth);
    fv_store_path(&g_place, FV_STORE_COORDINATOR, f->path);
    f->n_bytes = fv_read_file(f->path, f->whole, sizeof(f->whole));
    f->n_records = fv_find_records(f->whole, f->n_bytes, f->at, RECORDS_MAX);
    assert_int_equal(f->n_records, N_RECORDS);
    const found_t found = load(f->truth);
    assert_false(found.has_holes);
    assert_int_equal(found.n_kept, N_SESSIONS - 1);
    assert_int_equal(found.n_lost, 0);
}

static void drop_fixture(void)
{
    fv_ledger_t *ledger = NULL;

    fv_write_file(g_fix.path, g_fix.whole, g_fix.n_bytes);
    assert_int_equal(fv_ledger_open(&g_place, &ledger), FV_OK);
    fv_ledger_remove(ledger);
}

/* Heads of records [begin, end) can not be made out: one hole. */
static void test_holes_join_no_sessions(void **state)
{
    fixture_t *f = &g_fix;
    uint32_t n_lost = 0;

    (void)state;
    make_fixture();
    for (size_t begin = 0; begin < f->n_records; begin++) {
        memcpy(f->damaged, f->whole, f->n_bytes);
        for (size_t end = begin + 1U; end <= f->n_records; end++) {
            f->damaged[f->at[end - 1U] + 8U] ^= 0x40U;
            fv_write_file(f->path, f->damaged, f->n_bytes);
            const found_t found = load(f->truth);
            assert_true(found.has_holes);
            n_lost += found.n_lost;
        }
    }
    assert_true(n_lost > 0U);
    drop_fixture();
}

/* A record's body is damaged, and whose it was is known: its session is lost, and said to be. */
static void test_damaged_sessions_are_known_to_be_lost(void **state)
{
    fixture_t *f = &g_fix;
    uint32_t n_whole_bodies = 0;

    (void)state;
    make_fixture();
    for (size_t i = 1; i < f->n_records; i++) { /* record 0 is the model */
        size_t n_body = f->at[i + 1U] - f->at[i] - fv_journal_size(0);
        if (n_body == 0U) { /* CLOSE */
            n_whole_bodies++;
            continue;
        }
        memcpy(f->damaged, f->whole, f->n_bytes);
        f->damaged[f->at[i] + fv_journal_size(0) + n_body / 2U] ^= 0x40U;
        fv_write_file(f->path, f->damaged, f->n_bytes);
        const found_t found = load(f->truth);
        assert_false(found.has_holes);
        /* FIRST was closed: its records are missed by its fork alone. Of an opening the id is gone, too. */
        bool has_no_id = (i == OPENS_OTHER) || (i == OPENS_FORK) || (i == OPENS_SECOND);
        assert_int_equal(found.n_unknown, has_no_id ? 1U : 0U);
        assert_int_equal(found.n_lost, has_no_id ? 0U : 1U);
        assert_int_equal(found.n_kept, N_SESSIONS - 2);
    }
    assert_int_equal(n_whole_bodies, 1);
    drop_fixture();
}

/* A model that comes back counts for whoever registered it; also when the journal was written anew in between. */
static void test_models_count_for_their_owner(void **state)
{
    truth_t truth[N_SESSIONS];
    fv_ledger_t *ledger = NULL;
    fv_lost_t *lost = NULL;
    bool has_holes = false;

    (void)state;
    g_owner.n_models = 0;
    write_ledger(truth);
    assert_int_equal(g_owner.n_models, 1);
    for (int round = 0; round < 2; round++) {
        fv_sched_t *sched = fv_case_sched(1, 64, 1U << 20U);
        g_owner.n_models = 0;
        assert_int_equal(fv_lost_create(&lost), FV_OK);
        assert_int_equal(fv_ledger_open(&g_place, &ledger), FV_OK);
        assert_int_equal(fv_ledger_load(ledger, sched, owner_of, NULL, lost, &has_holes), FV_OK);
        assert_int_equal(g_owner.n_models, 1);
        assert_ptr_equal(fv_sched_model_owner(sched, 0), &g_owner);
        assert_int_equal(fv_ledger_rewrite(ledger, sched), FV_OK);
        fv_lost_destroy(lost);
        fv_ledger_close(ledger);
        fv_sched_destroy(sched);
    }
    assert_int_equal(fv_ledger_open(&g_place, &ledger), FV_OK);
    fv_ledger_remove(ledger);
}

/* Level host: nothing in memory, all of it on the disk; then flipped there, at places all over it. */
static void test_comes_back_from_a_disk(void **state)
{
    const fv_store_place_t memory = g_place;
    fixture_t *f = &g_fix;
    char dir[64] = "fv_ledger_XXXXXX";
    char log[FV_STORE_PATH_BYTES];
    uint32_t n_lost = 0;
    uint32_t n_kept = 0;

    (void)state;
    assert_non_null(mkdtemp(dir));
    assert_int_equal(fv_store_place_disk(&g_place, dir), FV_OK);
    make_fixture();
    fv_store_path(&g_place, FV_STORE_COORDINATOR_LOG, log);
    assert_int_equal(unlink(f->path), 0);
    assert_int_equal(load(f->truth).n_kept, N_SESSIONS - 1);
    size_t n_bytes = fv_read_file(log, f->whole, sizeof(f->whole));
    size_t n_used = n_bytes;
    while (f->whole[n_used - 1U] == 0U) {
        n_used--;
    }
    size_t step = (n_used - FV_JOURNAL_HEAD_BYTES) / 60U | 1U;
    for (size_t at = FV_JOURNAL_HEAD_BYTES; at < n_used; at += step) {
        assert_int_equal(unlink(f->path), 0);
        memcpy(f->damaged, f->whole, n_bytes);
        f->damaged[at] ^= (uint8_t)(1U << (at % 8U));
        fv_write_file(log, f->damaged, n_bytes);
        const found_t found = load(f->truth); /* checks what is kept */
        n_lost += found.n_lost;
        n_kept += found.n_kept;
    }
    assert_true(n_lost > 0U);
    assert_true(n_kept > 60U); /* of 180 */
    assert_int_equal(unlink(f->path), 0);
    fv_write_file(log, f->whole, n_bytes);
    fv_ledger_t *ledger = NULL;
    assert_int_equal(fv_ledger_open(&g_place, &ledger), FV_OK);
    assert_int_equal(fv_ledger_durability(ledger), 2);
    fv_ledger_remove(ledger);
    g_place = memory;
    assert_int_equal(rmdir(dir), -1); /* gone with the last of it */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_models_count_for_their_owner),
        cmocka_unit_test(test_comes_back_from_a_disk),
        cmocka_unit_test(test_holes_join_no_sessions),
        cmocka_unit_test(test_damaged_sessions_are_known_to_be_lost),
    };

    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
