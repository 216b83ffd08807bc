/*
 * sim_job.c - deterministic simulation of a whole job: scheduler, control protocol, fencing and recovery.
 *
 * Goal:   whatever dies, stops, is cut off, comes late or is repeated: no acknowledged token is lost, none is doubled, every
 *         request ends with one answer in bounded time, a refusal changes nothing, epochs never go back, nothing of an older
 *         epoch is accepted, and at the end all memory and all quotas are free and every process leaves cleanly.
 * Method: real code of coordinator, workers, spares, ledger and stores in a virtual world (tests/sim/world.h): one seed is
 *         one story. FV_SEED tells one story (FV_SIM_TELL=1 says what happens), FV_SIM_STORIES sets how many from there on.
 */
#include "tests/sim/job.h"
#include "tests/support/test.h"

#include <stdlib.h>
#include <time.h>

#define N_STORIES 300

/*
 * Seeds of stories that failed once, and why. What a seed tells changes with the code it runs; what it was about is then told
 * by a plan, below.
 */
static const struct {
    uint64_t seed;
    const char *what;
} k_named[] = {
    {123, "a model that was registered while a rank died was not in the ledger: sessions lost"},
    {835, "the same: the model is not known after a restart"},
};

static void test_named_stories(void **state)
{
    (void)state;
    for (size_t i = 0; i < FV_COUNT(k_named); i++) {
        print_message("%s\n", k_named[i].what);
        sim_story(k_named[i].seed, NULL);
    }
    sim_story_clean();
}

#define PLANS 12U /* stories of a kind */

/* A rank dies over each kind of message, at each of its next calls; then everything does. */
static void test_deaths_over_messages(void **state)
{
    static const struct {
        uint16_t type;
        const char *what;
    } messages[] = {
        {FV_CTL_MODEL, "MODEL: it is in the ledger, though no answer came"},
        {FV_CTL_OPEN, "OPEN: a session that nobody was told of is no session"},
        {FV_CTL_FORK, "FORK"},
        {FV_CTL_TRUNCATE, "TRUNCATE: cut once, on all ranks"},
        {FV_CTL_CLOSE, "CLOSE: it does not come back"},
        {FV_CTL_STEP, "STEP: appended once"},
    };

    (void)state;
    for (size_t i = 0; i < FV_COUNT(messages); i++) {
        uint64_t n_deaths = sim_n_deaths();
        uint64_t n_kills = g_sim_counts.n_kills;
        print_message("%s\n", messages[i].what);
        for (uint32_t n = 0; n < PLANS; n++) {
            sim_plan_t plan = {.type = messages[i].type, .nth = 1U + n % 3U, .n_calls = 1U + n};
            sim_story(1000U + n, &plan);
        }
        n_deaths = sim_n_deaths() - n_deaths;
        n_kills = g_sim_counts.n_kills - n_kills;
        print_message("    %llu of %u died over it\n", (unsigned long long)n_deaths, PLANS);
        assert_in_range(n_deaths, PLANS / 2U, PLANS); /* some stories have too few messages of it */
        assert_true(n_kills >= n_deaths + PLANS / 2U); /* and rank 0 after each */
    }
    sim_story_clean();
}

/*
 * A second rank dies while a spare takes the first one's place: the spare is new once more, and has its worker already. It took it
 * for another service's once, and left.
 */
static void test_two_deaths_in_a_repair(void **state)
{
    (void)state;
    for (uint32_t n = 0; n < PLANS; n++) {
        uint64_t n_deaths = sim_n_deaths();
        sim_plan_t plan = {
            .type = FV_CTL_STEP, .nth = 1, .n_calls = 1U + n % 4U, .has_second = true};
        sim_story(2000U + n, &plan);
        assert_int_equal(sim_n_deaths() - n_deaths, 2);
        assert_int_equal(sim_job_n_starts(), 1); /* there were spares for both */
    }
    sim_story_clean();
}

static void test_stories(void **state)
{
    const char *text = getenv("FV_SIM_STORIES");
    int n_stories = (text != NULL) ? atoi(text) : ((getenv("FV_SEED") != NULL) ? 1 : N_STORIES);
    uint64_t first = fv_random_seed(1);
    const sim_counts_t *n = &g_sim_counts;

    (void)state;
    *(sim_counts_t *)&g_sim_counts = (sim_counts_t){0};
    for (int i = 0; i < n_stories; i++) {
        if ((i > 0) && ((i % 1000) == 0)) {
            print_message("%d stories\n", i);
        }
        sim_story(first + (uint64_t)i, NULL);
    }
    sim_story_clean();
    print_message("%d stories: %llu operations, %llu served, %llu tried again, %llu refused, %llu "
                  "for want of memory, %llu left in the middle, %llu sessions lost; %llu killed, "
                  "%llu stopped, %llu cut off; %llu starts, %llu epochs, %llu messages\n",
                  n_stories, (unsigned long long)n->n_operations, (unsigned long long)n->n_served,
                  (unsigned long long)n->n_retries, (unsigned long long)n->n_refused,
                  (unsigned long long)n->n_exhausted, (unsigned long long)n->n_cancelled,
                  (unsigned long long)n->n_lost, (unsigned long long)n->n_kills,
                  (unsigned long long)n->n_stops, (unsigned long long)n->n_partitions,
                  (unsigned long long)n->n_starts, (unsigned long long)n->n_epochs,
                  (unsigned long long)n->n_messages);
    if (n_stories >= N_STORIES) { /* the stories must have something to tell */
        assert_true((n->n_served > 1000) && (n->n_retries > 100) && (n->n_refused > 100));
        assert_true((n->n_exhausted > 2) && (n->n_cancelled > 100) && (n->n_epochs > 10));
        assert_true((n->n_kills > 50) && (n->n_stops > 10) && (n->n_partitions > 3));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_named_stories),
        cmocka_unit_test(test_deaths_over_messages),
        cmocka_unit_test(test_two_deaths_in_a_repair),
        cmocka_unit_test(test_stories),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
