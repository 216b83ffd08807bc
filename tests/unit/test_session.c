/*
 * test_session.c - the coordinator's session table and append log.
 *
 * Goal:   the table finds what is in it and nothing else, whatever was removed; the log proves retries and forgets
 *         what was cut.
 * Method: random adds and removes against an array; hand-made logs.
 */
#include "coord/session.h"
#include "tests/support/random.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <string.h>

#define N_MAX 200

static fv_session_id_t id_of(uint32_t i)
{
    fv_session_id_t id = {{0}};
    uint32_t crowd = i % 7U; /* few distinct hash values: long runs in the table */

    memcpy(id.bytes, &crowd, sizeof(crowd));
    memcpy(id.bytes + 8, &i, sizeof(i));
    return id;
}

static void test_table_against_array(void **state)
{
    fv_session_table_t *table = NULL;
    fv_session_t *known[N_MAX * 2] = {NULL};
    fv_random_t seed = {.state = fv_random_seed(1)};
    uint32_t n = 0;

    (void)state;
    assert_int_equal(fv_session_table_create(N_MAX, &table), FV_OK);
    for (int round = 0; round < 20000; round++) {
        uint32_t i = (uint32_t)fv_random_int(&seed, 0, N_MAX * 2 - 1);
        fv_session_id_t id = id_of(i);
        assert_ptr_equal(fv_session_find(table, &id), known[i]);
        if (known[i] != NULL) {
            fv_session_remove(table, known[i]);
            known[i] = NULL;
            n--;
        } else {
            fv_status_t status = fv_session_add(table, &id, 1, &known[i]);
            assert_int_equal(status, (n < N_MAX) ? FV_OK : FV_ERR_EXHAUSTED);
            n += (status == FV_OK) ? 1U : 0U;
        }
        assert_int_equal(fv_session_table_count(table), n);
    }
    uint32_t n_listed = 0;
    uint64_t last = 0;
    for (const fv_session_t *s = fv_session_after(table, 0); s != NULL; s = s->next) {
        assert_true(s->opened_seq > last);
        last = s->opened_seq;
        n_listed++;
    }
    assert_int_equal(n_listed, n);
    fv_session_table_destroy(table);
}

static void test_slots_are_reused_not_shared(void **state)
{
    fv_session_table_t *table = NULL;
    fv_session_t *a = NULL;
    fv_session_t *b = NULL;
    fv_session_id_t id_a = id_of(1);
    fv_session_id_t id_b = id_of(2);

    (void)state;
    assert_int_equal(fv_session_table_create(2, &table), FV_OK);
    assert_int_equal(fv_session_add(table, &id_a, 1, &a), FV_OK);
    assert_int_equal(fv_session_add(table, &id_b, 1, &b), FV_OK);
    assert_int_not_equal(a->slot, b->slot);
    uint32_t slot = a->slot;
    fv_session_remove(table, a);
    assert_int_equal(fv_session_add(table, &id_a, 1, &a), FV_OK);
    assert_int_equal(a->slot, slot);
    fv_session_table_destroy(table);
}

static void append(fv_layer_t *layer, uint32_t n_tokens, uint32_t digest)
{
    assert_int_equal(fv_layer_reserve_record(layer), FV_OK);
    fv_layer_add_record(layer, layer->n_tokens, n_tokens, digest);
    layer->n_tokens += n_tokens;
}

static void test_log_finds_exact_appends_only(void **state)
{
    fv_layer_t layer = {0};

    (void)state;
    append(&layer, 10, 111);
    append(&layer, 1, 222);
    append(&layer, 5, 333);
    assert_int_equal(fv_layer_find_record(&layer, 0, 10)->digest, 111);
    assert_int_equal(fv_layer_find_record(&layer, 10, 1)->digest, 222);
    assert_int_equal(fv_layer_find_record(&layer, 11, 5)->digest, 333);
    assert_null(fv_layer_find_record(&layer, 0, 9));
    assert_null(fv_layer_find_record(&layer, 1, 9));
    assert_null(fv_layer_find_record(&layer, 16, 1));
    fv_layer_truncate(&layer, 12, false); /* cuts the last append in two: it is no longer known */
    assert_int_equal(layer.n_tokens, 12);
    assert_null(fv_layer_find_record(&layer, 11, 5));
    assert_non_null(fv_layer_find_record(&layer, 10, 1));
    fv_layer_truncate(&layer, 100, false); /* nothing to cut */
    assert_int_equal(layer.n_tokens, 12);
    free(layer.records);
}

static void test_fork_keeps_what_lies_before_the_cut(void **state)
{
    fv_layer_t parent = {0};
    fv_layer_t child = {0};

    (void)state;
    append(&parent, 64, 1);
    append(&parent, 64, 2);
    assert_int_equal(fv_layer_fork(&parent, 100, &child), FV_OK);
    assert_int_equal(child.n_tokens, 100);
    assert_int_equal(child.n_records, 1);
    assert_true(fv_layer_copies_tail(&child)); /* its last page is a full one of the parent's */
    assert_false(fv_layer_copies_tail(&parent));
    assert_int_equal(parent.n_tokens, 128);
    assert_int_equal(parent.n_records, 2);
    append(&child, 7, 3); /* grows on its own */
    assert_int_equal(parent.n_records, 2);
    free(parent.records);
    free(child.records);
}

/* Three sessions on one partial page: all but the last to write copy it. */
static void test_tails_are_counted(void **state)
{
    fv_layer_t a = {0};
    fv_layer_t b = {0};
    fv_layer_t c = {0};

    (void)state;
    append(&a, 70, 1);
    assert_false(fv_layer_copies_tail(&a));
    assert_int_equal(fv_layer_fork(&a, UINT64_MAX, &b), FV_OK);
    assert_int_equal(fv_layer_fork(&b, 66, &c), FV_OK); /* the same page, less of it */
    assert_true(fv_layer_copies_tail(&a) && fv_layer_copies_tail(&b) && fv_layer_copies_tail(&c));
    fv_layer_own_tail(&b); /* b has appended: it copied the page */
    assert_true(fv_layer_copies_tail(&a) && fv_layer_copies_tail(&c));
    fv_layer_truncate(&c, 65, true); /* still that page */
    assert_true(fv_layer_copies_tail(&a) && fv_layer_copies_tail(&c));
    fv_layer_truncate(&c, 3,
                      true); /* lets go of it; which page is its last now is anybody's guess */
    assert_false(fv_layer_copies_tail(&a));
    assert_true(fv_layer_copies_tail(&c));
    fv_layer_own_tail(&a);
    free(a.records);
    free(b.records);
    free(c.records);
}

/* Each session comes once a round, whatever is removed; lists keep up with removals. */
static void test_rounds_and_lists(void **state)
{
    fv_session_table_t *table = NULL;
    fv_session_t *s[6];
    fv_session_list_t list = {0};

    (void)state;
    assert_int_equal(fv_session_table_create(8, &table), FV_OK);
    assert_null(fv_session_table_round(table));
    for (uint8_t i = 0; i < 6; i++) {
        fv_session_id_t id = {{i, i, i, i}};
        assert_int_equal(fv_session_add(table, &id, 1, &s[i]), FV_OK);
    }
    assert_ptr_equal(fv_session_table_round(table), s[0]);
    assert_ptr_equal(fv_session_table_round(table), s[1]);
    fv_session_list_add(&list, s[2]);
    fv_session_list_add(&list, s[3]);
    fv_session_list_add(&list, s[5]);
    fv_session_remove(table, s[2]); /* the next in turn, and on the list */
    assert_ptr_equal(fv_session_table_round(table), s[3]);
    fv_session_remove(table, s[3]); /* the last one given, in the list's middle */
    assert_ptr_equal(fv_session_table_round(table), s[4]);
    assert_ptr_equal(fv_session_table_round(table), s[5]);
    assert_ptr_equal(fv_session_table_round(table), s[0]);
    assert_ptr_equal(list.first, s[5]);
    assert_null(s[5]->next_of_list);
    fv_session_remove(table, s[5]);
    assert_null(list.first);
    fv_session_table_destroy(table);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_table_against_array),
        cmocka_unit_test(test_slots_are_reused_not_shared),
        cmocka_unit_test(test_log_finds_exact_appends_only),
        cmocka_unit_test(test_fork_keeps_what_lies_before_the_cut),
        cmocka_unit_test(test_tails_are_counted),
        cmocka_unit_test(test_rounds_and_lists),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
