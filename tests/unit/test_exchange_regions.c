/*
 * test_exchange_regions.c - the division of windows, and the way each message goes.
 *
 * Goal:   regions of a window never overlap, both ends of a message find the same place and the same way, and a message
 *         never lies where the one before it may still be read.
 * Method: two to five ranks in one address space, random sizes, both ends compared.
 */
#include "tests/support/random.h"
#include "tests/support/test.h"
#include "worker/exchange_regions.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RANKS_MAX 5
#define WINDOW    ((size_t)96 << 20)
#define SPILL     ((size_t)256 << 20)

static uint64_t seed;

static void test_regions_fill_the_window(void **state)
{
    static const size_t windows[] = {4096, 8192, 12288, 40960, 1 << 20, ((size_t)1 << 32) + 4096};

    (void)state;
    for (size_t i = 0; i < FV_COUNT(windows); i++) {
        for (uint32_t n = 1; n <= 72U; n++) {
            fv_exchange_regions_t r = {0};
            size_t flags_end = fv_exchange_flag_at(n - 1U) + FV_EXCHANGE_FLAG_BYTES;

            if (!fv_exchange_regions_make(windows[i], n, &r)) {
                assert_true(windows[i] < flags_end + 4096U + 2U * n * 4096U);
                continue;
            }
            assert_int_equal(r.region_bytes % FV_EXCHANGE_REGION_ALIGN, 0);
            for (uint32_t k = 0; k < 2U * n; k++) {
                size_t at = fv_exchange_region_at(&r, k / n, k % n);

                assert_true(at >= flags_end + 4U * n * r.ll_bytes);
                assert_true((r.ll_bytes == 0U) ||
                            (fv_exchange_ll_region_at(&r, k / n, k % n) ==
                             fv_exchange_ll_region_at(&r, 0, 0) + k * 2U * r.ll_bytes));
                assert_true(at + r.region_bytes <= windows[i]);
                assert_true(
                    (k == 0U) ||
                    (at == fv_exchange_region_at(&r, (k - 1U) / n, (k - 1U) % n) + r.region_bytes));
            }
            /* what is left over is less than a region would grow by */
            assert_true(windows[i] - fv_exchange_region_at(&r, 1, n - 1U) - r.region_bytes <
                        2U * n * FV_EXCHANGE_REGION_ALIGN);
        }
    }
    fv_exchange_regions_t r;
    assert_false(fv_exchange_regions_make(WINDOW, 0, &r));
}

static fv_exchange_route_t way(bool is_reached, size_t ll_bytes, size_t sent, size_t received)
{
    fv_exchange_regions_t regions = {.n_sources = 2, .region_bytes = 100, .ll_bytes = ll_bytes};

    return fv_exchange_route(is_reached, &regions, sent, received);
}

static void test_ways(void **state)
{
    fv_exchange_route_t r = way(true, 0, 100, 101);

    (void)state;
    assert_true(r.is_send_direct && !r.is_recv_direct && r.is_paired && !r.is_ll);
    r = way(true, 0, 0, 1);
    assert_true(!r.is_send_direct && r.is_recv_direct && r.is_paired);
    r = way(true, 50, 101, 101);
    assert_true(!r.is_send_direct && !r.is_recv_direct && !r.is_paired);
    r = way(false, 50, 1, 1);
    assert_true(!r.is_send_direct && !r.is_recv_direct && !r.is_paired && !r.is_ll);
    r = way(true, 50, 50, 50);
    assert_true(r.is_ll && r.is_paired && !r.is_send_direct && !r.is_recv_direct);
    r = way(true, 50, 51, 50); /* both or none */
    assert_true(!r.is_ll && r.is_send_direct && r.is_recv_direct);
    r = way(true, 50, 50, 0); /* nothing to read would come back */
    assert_true(!r.is_ll && r.is_send_direct && r.is_paired);
}

/* ------------------------------------------------------------------ several ranks */

typedef struct world {
    int n;
    uint8_t *windows[RANKS_MAX];
    fv_exchange_place_t places[RANKS_MAX];
    fv_exchange_known_t known[RANKS_MAX][RANKS_MAX];
    uint8_t *spills[RANKS_MAX];
    uint8_t
        *last[RANKS_MAX][RANKS_MAX]; /* where the pair's message lay, in its step number last_seq */
    uint32_t last_seq[RANKS_MAX][RANKS_MAX];
    uint64_t n_ll, n_direct;
} world_t;

static void open_world(world_t *w, int n, size_t window_bytes)
{
    memset(w, 0, sizeof(*w));
    w->n = n;
    for (int r = 0; r < n; r++) {
        w->windows[r] = malloc(window_bytes);
        w->spills[r] = malloc(SPILL);
        assert_true((w->windows[r] != NULL) && (w->spills[r] != NULL));
    }
    for (int r = 0; r < n; r++) {
        fv_exchange_place_t *p = &w->places[r];

        p->window = w->windows[r];
        p->spill = w->spills[r];
        p->self_source = (uint32_t)r;
        p->known = w->known[r];
        assert_true(fv_exchange_regions_make(window_bytes, (uint32_t)n, &p->regions));
        for (int o = 0; o < n; o++) {
            w->known[r][o].source = (uint32_t)o;
            w->known[r][o].window = (o == r) ? NULL : w->windows[o];
        }
    }
}

static void close_world(world_t *w)
{
    for (int r = 0; r < w->n; r++) {
        fv_exchange_place_free(&w->places[r]);
        free(w->windows[r]);
        free(w->spills[r]);
    }
}

static const fv_exchange_peer_t *find(const fv_exchange_peer_t *peers, size_t n, int rank)
{
    for (size_t i = 0; i < n; i++) {
        if (peers[i].rank == (uint32_t)rank) {
            return &peers[i];
        }
    }
    return NULL;
}

static const fv_merge_pair_t *find_pair(const fv_exchange_place_t *place, int rank)
{
    for (size_t i = 0; i < place->n_pairs; i++) {
        if (((const uint32_t *)place->pair_ranks.data)[i] == (uint32_t)rank) {
            return (const fv_merge_pair_t *)place->pairs.data + i;
        }
    }
    return NULL;
}

/* One step of all ranks: sizes[from][to]. Both ends agree, and no message lies where that of the step before lay. */
static void step(world_t *w, size_t sizes[RANKS_MAX][RANKS_MAX])
{
    fv_exchange_peer_t peers[RANKS_MAX][RANKS_MAX];
    size_t n_peers[RANKS_MAX] = {0};
    uint8_t *own = NULL;

    for (int r = 0; r < w->n; r++) {
        for (int o = 0; o < w->n; o++) {
            if ((o != r) && (sizes[r][o] + sizes[o][r] > 0U)) {
                peers[r][n_peers[r]++] = (fv_exchange_peer_t){
                    .rank = (uint32_t)o, .send_bytes = sizes[r][o], .recv_bytes = sizes[o][r]};
            }
        }
        assert_true(fv_exchange_spill_bytes(&w->places[r], peers[r], n_peers[r], 100) <= SPILL);
        assert_int_equal(fv_exchange_place(&w->places[r], peers[r], n_peers[r], 100, &own), FV_OK);
        assert_true((own >= w->windows[r]) && (own < w->windows[r] + WINDOW));
    }
    for (int r = 0; r < w->n; r++) {
        for (int o = 0; o < w->n; o++) {
            const fv_exchange_peer_t *mine = find(peers[r], n_peers[r], o);

            if ((o == r) || (mine == NULL)) {
                continue;
            }
            const fv_exchange_peer_t *its = find(peers[o], n_peers[o], r);
            bool is_direct =
                (sizes[r][o] > 0U) && (sizes[r][o] <= w->places[r].regions.region_bytes);
            const fv_merge_pair_t *pair = find_pair(&w->places[r], o);
            const fv_merge_pair_t *pair_of_peer = find_pair(&w->places[o], r);

            assert_non_null(its);
            assert_int_equal(pair != NULL, pair_of_peer != NULL);
            if (pair != NULL) { /* what the one sets is what the other waits for */
                assert_ptr_equal(pair->signal, pair_of_peer->awaited);
                assert_ptr_equal(pair->ll_send, pair_of_peer->ll_recv);
                assert_int_equal(pair->send_bytes, pair_of_peer->recv_bytes);
                assert_int_equal(pair->value, pair_of_peer->value);
            }
            if ((pair != NULL) && (pair->ll_send != NULL)) {
                assert_ptr_equal(pair->send, mine->send);
                assert_ptr_equal(pair->ll_recv, mine->recv);
                assert_true((w->last_seq[r][o] + 1U != pair->value) ||
                            ((const uint8_t *)pair->ll_send != w->last[r][o]));
                w->last[r][o] = (uint8_t *)pair->ll_send;
                w->last_seq[r][o] = pair->value;
                w->n_ll++;
                continue;
            }
            if (is_direct) {
                assert_non_null(pair);
                assert_ptr_equal(mine->send, its->recv);
                if (w->last_seq[r][o] + 1U == pair->value) {
                    assert_ptr_not_equal(mine->send, w->last[r][o]);
                }
                w->n_direct++;
                w->last[r][o] = mine->send;
                w->last_seq[r][o] = pair->value;
            } else if (sizes[r][o] > 0U) {
                assert_true((mine->send >= w->spills[r]) &&
                            (mine->send + sizes[r][o] <= w->spills[r] + SPILL));
            }
        }
    }
}

static void test_both_ends_agree(void **state)
{
    fv_random_t random = {seed};

    (void)state;
    for (int n = 2; n <= RANKS_MAX; n++) {
        world_t w;

        open_world(&w, n, WINDOW);
        for (int i = 0; i < 300; i++) {
            size_t sizes[RANKS_MAX][RANKS_MAX];

            for (int k = 0; k < RANKS_MAX * RANKS_MAX; k++) {
                int64_t kind = fv_random_int(&random, 0, 9);

                sizes[k / RANKS_MAX][k % RANKS_MAX] =
                    (kind < 4)   ? 0U
                    : (kind < 9) ? (size_t)fv_random_int(&random, 1, 4096) * 16U
                                 : (size_t)fv_random_int(&random, 1, WINDOW / 4);
            }
            step(&w, sizes);
        }
        assert_true((w.n_ll > 20U) && (w.n_direct > 20U));
        close_world(&w);
    }
}

/* The number of a pair wraps; what is awaited is always what the other sets. */
static void test_the_count_wraps(void **state)
{
    size_t sizes[RANKS_MAX][RANKS_MAX] = {{0, 64}, {64, 0}};
    world_t w;

    (void)state;
    open_world(&w, 2, WINDOW);
    w.known[0][1].seq = UINT32_MAX - 1U;
    w.known[1][0].seq = UINT32_MAX - 1U;
    for (int i = 0; i < 4; i++) {
        step(&w, sizes);
    }
    assert_int_equal(w.known[0][1].seq, 4); /* 0 is left out */
    close_world(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_regions_fill_the_window),
        cmocka_unit_test(test_ways),
        cmocka_unit_test(test_both_ends_agree),
        cmocka_unit_test(test_the_count_wraps),
    };

    seed = fv_random_seed(1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
