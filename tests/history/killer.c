/*
 * killer.c - finds the processes that a launcher has started, by their parents, and kills one that is a rank.
 */
#include "tests/history/history.h"

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RANKS_MAX 16

/* 0: not to be read. */
static pid_t parent_of(pid_t pid)
{
    char path[64];
    char line[512];
    pid_t parent = 0;

    (void)snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        return 0;
    }
    const char *end = (fgets(line, sizeof(line), file) != NULL) ? strrchr(line, ')') : NULL;
    if (end != NULL) { /* "PID (NAME) S PARENT ..." */
        parent = (pid_t)strtol(end + 3, NULL, 10);
    }
    (void)fclose(file);
    return parent;
}

static bool is_below(pid_t pid, pid_t ancestor)
{
    for (int depth = 0; (pid > 1) && (depth < 8); depth++) {
        if (pid == ancestor) {
            return true;
        }
        pid = parent_of(pid);
    }
    return false;
}

/* From its environment; -1: it is none of Open MPI's. */
static int rank_of(pid_t pid)
{
    static const char key[] = "OMPI_COMM_WORLD_RANK=";
    char path[64];
    static char text[65536]; /* large; one thread */
    int rank = -1;

    (void)snprintf(path, sizeof(path), "/proc/%d/environ", (int)pid);
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        return -1;
    }
    size_t n = fread(text, 1, sizeof(text) - 1U, file);
    text[n] = '\0';
    for (size_t i = 0; i < n; i += strlen(text + i) + 1U) {
        if (strncmp(text + i, key, sizeof(key) - 1U) == 0) {
            rank = (int)strtol(text + i + sizeof(key) - 1U, NULL, 10);
        }
    }
    (void)fclose(file);
    return rank;
}

int hs_kill_some_rank(pid_t launcher, fv_random_t *random)
{
    pid_t pids[RANKS_MAX];
    int ranks[RANKS_MAX];
    int n = 0;
    DIR *all = opendir("/proc");

    for (struct dirent *entry = (all == NULL) ? NULL : readdir(all);
         (entry != NULL) && (n < RANKS_MAX); entry = readdir(all)) {
        pid_t pid = (pid_t)strtol(entry->d_name, NULL, 10);
        if ((pid > 1) && is_below(pid, launcher)) {
            ranks[n] = rank_of(pid);
            pids[n] = pid;
            n += (ranks[n] >= 0) ? 1 : 0;
        }
    }
    if (all != NULL) {
        (void)closedir(all);
    }
    if (n == 0) {
        return -1;
    }
    int i = (int)fv_random_int(random, 0, n - 1);
    return (kill(pids[i], SIGKILL) == 0) ? ranks[i] : -1;
}
