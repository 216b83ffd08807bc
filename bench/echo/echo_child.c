/*
 * echo_child.c - starts and stops the echo server; builds and checks its messages.
 */
#include "bench/echo/echo_child.h"

#include "bench/echo/echo.h"

#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* The first line that the child writes is the address it serves. */
static bool read_line(int fd, char *line, size_t n_bytes)
{
    size_t n = 0;

    while ((n + 1U < n_bytes) && (read(fd, line + n, 1) == 1)) {
        if (line[n] == '\n') {
            line[n] = '\0';
            return true;
        }
        n++;
    }
    return false;
}

bool fv_echo_child_start(const char *address, fv_echo_child_t *out)
{
    char program[512];
    char option[] = "--serve";
    char where[128];
    int ends[2];
    posix_spawn_file_actions_t actions;
    ssize_t n = readlink("/proc/self/exe", program, sizeof(program) - 16U);

    if ((n <= 0) || (pipe(ends) != 0)) {
        return false;
    }
    program[n] = '\0';
    (void)snprintf(strrchr(program, '/') + 1, 16, "bench_echo");
    (void)snprintf(where, sizeof(where), "%s", address);
    char *argv[] = {program, option, where, NULL};
    (void)posix_spawn_file_actions_init(&actions);
    (void)posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    (void)posix_spawn_file_actions_addclose(&actions, ends[0]);
    (void)posix_spawn_file_actions_addclose(&actions, ends[1]);
    int error = posix_spawn(&out->pid, program, &actions, NULL, argv, environ);
    (void)posix_spawn_file_actions_destroy(&actions);
    (void)close(ends[1]);
    bool is_up = (error == 0) && read_line(ends[0], out->address, sizeof(out->address));
    (void)close(ends[0]);
    if (!is_up) {
        (void)fprintf(stderr, "cannot start %s\n", program);
    }
    return is_up;
}

void fv_echo_child_stop(fv_echo_child_t *child)
{
    if (child->pid > 0) {
        (void)kill(child->pid, SIGKILL);
        (void)waitpid(child->pid, NULL, 0);
    }
    if (strncmp(child->address, "unix:", 5) == 0) {
        (void)unlink(child->address + 5);
    }
    child->pid = 0;
}

static void build(void *ctx, uint32_t slot, fv_load_request_t *out)
{
    fv_echo_load_t *load = ctx;

    load->heads[slot][0] = load->reply_bytes;
    load->heads[slot][1] = slot;
    out->pieces[0] = (fv_span_t){(const uint8_t *)load->heads[slot], ECHO_HEAD_BYTES};
    out->is_copied[0] = true;
    out->pieces[1] = (fv_span_t){load->body, load->request_bytes - ECHO_HEAD_BYTES};
    out->is_copied[1] = false;
    out->n_pieces = (load->request_bytes > ECHO_HEAD_BYTES) ? 2U : 1U;
}

static bool check(void *ctx, const fv_span_t *spans, size_t n_spans, uint32_t *out_slot)
{
    const fv_echo_load_t *load = ctx;
    uint64_t head[2] = {0, 0};
    size_t n_head = 0;
    size_t n_bytes = 0;

    for (size_t i = 0; i < n_spans; i++) {
        size_t n = spans[i].n_bytes;
        n = (n < sizeof(head) - n_head) ? n : (sizeof(head) - n_head);
        memcpy((uint8_t *)head + n_head, spans[i].data, n);
        n_head += n;
        n_bytes += spans[i].n_bytes;
    }
    *out_slot = (uint32_t)head[1];
    return (n_bytes == load->reply_bytes) && (head[0] == load->reply_bytes) &&
           (head[1] < LOAD_SLOTS_MAX);
}

bool fv_echo_load_init(fv_echo_load_t *load, size_t request_bytes, size_t reply_bytes)
{
    memset(load, 0, sizeof(*load));
    load->request_bytes = (request_bytes > ECHO_HEAD_BYTES) ? request_bytes : ECHO_HEAD_BYTES;
    load->reply_bytes = (reply_bytes > ECHO_HEAD_BYTES) ? reply_bytes : ECHO_HEAD_BYTES;
    load->body = malloc(load->request_bytes);
    if (load->body == NULL) {
        return false;
    }
    memset(load->body, 0x5a, load->request_bytes);
    return true;
}

void fv_echo_load_fini(fv_echo_load_t *load)
{
    free(load->body);
    load->body = NULL;
}

fv_workload_t fv_echo_workload(fv_echo_load_t *load)
{
    return (fv_workload_t){.stream_method = ECHO_STREAM,
                           .once_method = ECHO_ONCE,
                           .ctx = load,
                           .build = build,
                           .check = check};
}
