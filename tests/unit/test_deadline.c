/*
 * test_deadline.c - a process that blocks past its deadline ends with the code it was given; one that disarms it does not.
 */
#include "common/deadline.h"
#include "tests/support/test.h"

#include <stdbool.h>
#include <sys/wait.h>
#include <unistd.h>

/* The exit code of a child that arms, maybe disarms, and sleeps longer than the deadline. */
static int code_of_child(bool disarms)
{
    int status = 0;
    pid_t pid = fork();

    assert_true(pid >= 0);
    if (pid == 0) {
        fv_deadline_arm(100, 7, "a test");
        if (disarms) {
            fv_deadline_disarm();
        }
        (void)usleep(600000);
        _exit(9);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void test_the_process_ends_in_time(void **state)
{
    (void)state;
    assert_int_equal(code_of_child(false), 7);
    assert_int_equal(code_of_child(true), 9);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_the_process_ends_in_time)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
