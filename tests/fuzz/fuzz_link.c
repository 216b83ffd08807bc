/*
 * fuzz_link.c - any bytes as what a rank says to the coordinator.
 *
 * Input: byte 0 is what the coordinator waits for, byte 1 how many layers or items it asked about; then the bytes on the
 *        socket. Of byte 0 the top bit: a header as it should be comes before them, and byte 2 is put on its body's size.
 * Checks: an error has a text; an answer that is taken is whole, its texts end, and it fills no more than was asked for.
 */
#include "coord/link.h"
#include "tests/fuzz/no_mpi.h"

#include <mpi.h>

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define COUNT_MAX 32U
#define INPUT_CAP ((size_t)1 << 16)
#define EPOCH     3U

/* NOLINTNEXTLINE(readability-identifier-naming): the name is libFuzzer's */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void check(bool ok, const char *what)
{
    if (!ok) {
        (void)fprintf(stderr, "fuzz_link: %s (%s)\n", what, fv_error_context());
        abort();
    }
}

static void check_done(const fv_ctl_done_t *done)
{
    check(memchr(done->error.text, '\0', sizeof(done->error.text)) != NULL, "an endless text");
}

static fv_status_t wait_kept(fv_link_t *link, size_t n)
{
    fv_ctl_done_t done;
    uint64_t *floors = malloc((n + 1U) * sizeof(*floors)); /* exactly: a write behind it is seen */

    check(floors != NULL, "memory");
    memset(floors, 0x5a, (n + 1U) * sizeof(*floors));
    uint64_t guard = floors[n];
    fv_status_t status = fv_link_wait_kept(link, 1, &done, floors, n);
    check(floors[n] == guard, "more floors than layers");
    free(floors);
    if (status == FV_OK) {
        check_done(&done);
    }
    return status;
}

/* The end of a step that was never begun: only its DONE is read. */
static fv_status_t test_step(fv_link_t *link, size_t n)
{
    fv_ctl_done_t done;
    bool is_done = false;
    fv_error_t *errors = calloc(n + 1U, sizeof(*errors));

    check(errors != NULL, "memory");
    fv_status_t status = fv_link_step_test(link, 0, 1, &is_done, &done, errors, n);
    if ((status == FV_OK) && is_done) {
        check_done(&done);
        for (size_t i = 0; i < n; i++) {
            check(memchr(errors[i].text, '\0', sizeof(errors[i].text)) != NULL, "an endless text");
        }
    }
    free(errors);
    return status;
}

static fv_status_t wait_for(fv_link_t *link, uint8_t what, size_t n)
{
    fv_ctl_done_t done;
    static fv_ctl_hello_t hello;
    fv_status_t status = FV_OK;

    switch (what % 4U) {
    case 0:
        status = fv_link_wait_done(link, 1, &done);
        if (status == FV_OK) {
            check_done(&done);
        }
        return status;
    case 1:
        return wait_kept(link, n);
    case 2:
        return test_step(link, n);
    default:
        status = fv_link_wait_hello(link, 1, &hello);
        check((status != FV_OK) || ((memchr(hello.host, '\0', sizeof(hello.host)) != NULL) &&
                                    (memchr(hello.backend, '\0', sizeof(hello.backend)) != NULL) &&
                                    (memchr(hello.device, '\0', sizeof(hello.device)) != NULL)),
              "an endless text");
        return status;
    }
}

/* A header that fits what is waited for, its size moved by `delta`. */
static fv_ctl_header_t header_of(uint8_t what, size_t n, int8_t delta)
{
    static const uint16_t k_types[] = {FV_CTL_DONE, FV_CTL_KEPT, FV_CTL_DONE, FV_CTL_HELLO};
    const size_t k_bytes[] = {sizeof(fv_ctl_done_t), sizeof(fv_ctl_done_t) + n * sizeof(uint64_t),
                              sizeof(fv_ctl_done_t) + n * sizeof(fv_error_t),
                              sizeof(fv_ctl_hello_t)};

    return (fv_ctl_header_t){.magic = FV_CTL_MAGIC,
                             .type = k_types[what % 4U],
                             .epoch = EPOCH,
                             .body_bytes = (uint32_t)((int64_t)k_bytes[what % 4U] + delta)};
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    MPI_Comm comm = MPI_COMM_SELF;
    fv_link_t *link = NULL;
    int fds[2];
    int links[2] = {-1, -1};
    int size = (int)INPUT_CAP;

    if ((n_bytes < 3) || (n_bytes > INPUT_CAP / 2U)) {
        return 0;
    }
    size_t n = data[1] % (COUNT_MAX + 1U);
    check(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0, "socketpair");
    (void)setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    if ((data[0] & 0x80U) != 0U) {
        fv_ctl_header_t header = header_of(data[0], n, (int8_t)data[2]);
        check(send(fds[0], &header, sizeof(header), 0) == (ssize_t)sizeof(header), "send");
    }
    check(send(fds[0], data + 3, n_bytes - 3U, 0) == (ssize_t)(n_bytes - 3U), "send");
    (void)shutdown(fds[0], SHUT_WR); /* so that no wait is for nothing */
    links[1] = fds[1];
    check(fv_link_create((void *)&comm, 2, EPOCH, links, 1000, &link) == FV_OK, "link");
    for (int i = 0; i < 3; i++) {
        if (wait_for(link, data[0], n) != FV_OK) {
            check(fv_error_context()[0] != '\0', "refused without a text");
            break;
        }
    }
    fv_link_destroy(link);
    (void)close(fds[0]);
    return 0;
}
