/*
 * fovead.c - starts and stops the service under test, and runs programs.
 */
#define _GNU_SOURCE /* mkdtemp, environ-less exec; the test's own file only */
#include "tests/client/fovead.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ARGS_MAX      48
#define START_MS      60000 /* mpirun on a busy machine takes its time */
#define STOP_TRIES    600   /* of 100 ms */
#define FILE_NAME_MAX 128

static void sleep_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (ms % 1000) * 1000000};

    (void)nanosleep(&t, NULL);
}

/* Splits `words` (modified) at blanks onto argv. */
static int add_words(char **argv, int n, char *words)
{
    char *rest = NULL;

    for (char *w = strtok_r(words, " ", &rest); (w != NULL) && (n < ARGS_MAX - 1);
         w = strtok_r(NULL, " ", &rest)) {
        argv[n++] = w;
    }
    return n;
}

/* In the child: dies with the test, and is not judged by the test's own leak checker. */
static void exec_child(char *const *argv, int log_fd)
{
    (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
    (void)setenv("ASAN_OPTIONS", "detect_leaks=0", 1); /* Open MPI's */
    (void)dup2(log_fd, STDOUT_FILENO);
    (void)dup2(log_fd, STDERR_FILENO);
    (void)execvp(argv[0], argv);
    (void)fprintf(stderr, "%s: errno %d\n", argv[0], errno);
    _exit(127);
}

static bool spawn(fv_fovead_t *f, const char *const *extra)
{
    const char *program = getenv("FV_TEST_FOVEAD");
    const char *launch = getenv("FV_TEST_LAUNCH");
    char words[1024];
    char listen[128];
    char log[FILE_NAME_MAX];
    char *argv[ARGS_MAX] = {0};
    int n = 0;
    int fd = -1;

    if (program == NULL) {
        (void)fprintf(stderr, "FV_TEST_FOVEAD must name the fovead program\n");
        return false;
    }
    (void)snprintf(words, sizeof(words), "%s %s", (launch == NULL) ? "" : launch, program);
    n = add_words(argv, n, words);
    (void)snprintf(listen, sizeof(listen), "--listen=%s", f->address);
    argv[n++] = listen;
    for (size_t i = 0; (extra != NULL) && (extra[i] != NULL) && (n < ARGS_MAX - 1); i++) {
        argv[n++] = (char *)(uintptr_t)extra[i]; /* execvp's signature is not const-correct */
    }
    (void)snprintf(log, sizeof(log), "%s/log", f->dir);
    fd = open(log, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    f->pid = fork();
    if (f->pid == 0) {
        exec_child(argv, fd);
    }
    (void)close(fd);
    return f->pid > 0;
}

static void show_log(const fv_fovead_t *f)
{
    char path[FILE_NAME_MAX];
    char line[512];
    FILE *file = NULL;

    (void)snprintf(path, sizeof(path), "%s/log", f->dir);
    file = fopen(path, "r");
    while ((file != NULL) && (fgets(line, sizeof(line), file) != NULL)) {
        (void)fprintf(stderr, "fovead: %s", line);
    }
    if (file != NULL) {
        (void)fclose(file);
    }
}

static void remove_dir(const fv_fovead_t *f)
{
    static const char *const k_names[] = {"log", "s", "s.lock"};
    char path[FILE_NAME_MAX];

    for (size_t i = 0; i < (sizeof(k_names) / sizeof(k_names[0])); i++) {
        (void)snprintf(path, sizeof(path), "%s/%s", f->dir, k_names[i]);
        (void)unlink(path);
    }
    (void)rmdir(f->dir);
}

bool fv_fovead_start(fv_fovead_t *out, const char *const *extra)
{
    fovea_options_t options = {.connect_timeout_ms = 500};
    fovea_client_t *client = NULL;
    int status = 0;

    memset(out, 0, sizeof(*out));
    (void)snprintf(out->dir, sizeof(out->dir), "/tmp/fv-test-XXXXXX");
    if (mkdtemp(out->dir) == NULL) {
        return false;
    }
    (void)snprintf(out->address, sizeof(out->address), "unix:%s/s", out->dir);
    if (!spawn(out, extra)) {
        remove_dir(out);
        return false;
    }
    for (int waited_ms = 0; waited_ms < START_MS; waited_ms += 500) {
        if (fovea_connect(out->address, &options, &client, NULL) == FOVEA_OK) {
            fovea_close(client);
            return true;
        }
        if (waitpid(out->pid, &status, WNOHANG) == out->pid) {
            break;
        }
    }
    (void)fprintf(stderr, "fovead did not start\n");
    show_log(out);
    if (kill(out->pid, 0) == 0) {
        (void)kill(out->pid, SIGKILL);
        (void)waitpid(out->pid, &status, 0);
    }
    remove_dir(out);
    return false;
}

bool fv_fovead_stop(fv_fovead_t *f)
{
    fovea_client_t *client = NULL;
    bool is_drained = false;
    bool is_ok = false;
    int status = -1;

    if (fovea_connect(f->address, NULL, &client, NULL) == FOVEA_OK) {
        is_drained = fovea_drain(client, 0, 30000, NULL, NULL) == FOVEA_OK;
        fovea_close(client);
    }
    for (int i = 0; (i < STOP_TRIES) && (waitpid(f->pid, &status, WNOHANG) == 0); i++) {
        sleep_ms(100);
    }
    if (kill(f->pid, 0) == 0) { /* still there */
        (void)kill(f->pid, SIGKILL);
        (void)waitpid(f->pid, &status, 0);
    }
    is_ok = is_drained && WIFEXITED(status) && (WEXITSTATUS(status) == 0);
    if (!is_ok) {
        (void)fprintf(stderr, "drain %s, wait status %d\n", is_drained ? "ok" : "failed", status);
        show_log(f);
    }
    remove_dir(f);
    return is_ok;
}

int fv_run_program(char *const *argv, char *out, size_t out_bytes)
{
    int fds[2];
    size_t n = 0;
    ssize_t got = 0;
    pid_t pid = 0;
    int status = -1;
    char rest[256];

    if (pipe(fds) != 0) {
        return -1;
    }
    pid = fork();
    if (pid == 0) {
        (void)close(fds[0]);
        (void)dup2(fds[1], STDOUT_FILENO);
        (void)dup2(fds[1], STDERR_FILENO);
        (void)execvp(argv[0], argv);
        _exit(127);
    }
    (void)close(fds[1]);
    do { /* what does not fit is read and dropped, or the program would block */
        bool fits = (n + 1) < out_bytes;
        got = fits ? read(fds[0], out + n, out_bytes - 1 - n) : read(fds[0], rest, sizeof(rest));
        n += (fits && (got > 0)) ? (size_t)got : 0;
    } while (got > 0);
    out[n] = '\0';
    (void)close(fds[0]);
    (void)waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
