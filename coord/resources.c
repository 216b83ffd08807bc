/*
 * resources.c - /proc/meminfo, the cgroup's limit, and the cores a process may run on.
 */
#define _GNU_SOURCE /* sched_getaffinity */

#include "coord/resources.h"

#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)

static uint64_t meminfo_available(void)
{
    char line[256];
    uint64_t kib = 0;
    FILE *file = fopen("/proc/meminfo", "r");

    if (file == NULL) {
        return 0;
    }
    while (fgets(line, sizeof(line), file) != NULL) {
        if (sscanf(line, "MemAvailable: %" SCNu64, &kib) == 1) {
            break;
        }
    }
    (void)fclose(file);
    return kib * 1024U;
}

/* A number from a one-line file; false for "max", for no file, for anything else. */
static int read_number(const char *path, uint64_t *out)
{
    FILE *file = fopen(path, "r");
    int n = 0;

    if (file == NULL) {
        return 0;
    }
    n = fscanf(file, "%" SCNu64, out);
    (void)fclose(file);
    return n == 1;
}

uint64_t fv_memory_available(void)
{
    uint64_t available = meminfo_available();
    uint64_t limit = 0;
    uint64_t used = 0;

    if (read_number("/sys/fs/cgroup/memory.max", &limit) &&
        read_number("/sys/fs/cgroup/memory.current", &used) && (used < limit) &&
        (limit - used < available)) {
        available = limit - used;
    }
    return available;
}

uint64_t fv_resolve_kv_memory(const fv_memory_limit_t *limit, int32_t n_local_ranks)
{
    uint64_t n_bytes = limit->bytes;

    if (limit->percent > 0) {
        n_bytes = fv_memory_available() / 100U * (uint64_t)limit->percent / (uint64_t)n_local_ranks;
    }
    n_bytes = n_bytes / MIB * MIB;
    return (n_bytes < MIB) ? MIB : n_bytes;
}

int32_t fv_resolve_threads(int32_t configured, int32_t n_local_ranks)
{
    cpu_set_t set;
    int32_t n_bound = 1;
    int32_t n_online = (int32_t)sysconf(_SC_NPROCESSORS_ONLN);

    if (configured > 0) {
        return configured;
    }
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        n_bound = CPU_COUNT(&set);
    }
    int32_t share = n_online / n_local_ranks;
    if (share > n_bound) {
        share = n_bound;
    }
    return (share < 1) ? 1 : share;
}

const char *fv_format_bytes(uint64_t n_bytes, char text[24])
{
    static const char *const k_units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)n_bytes;
    size_t unit = 0;

    while ((value >= 1024.0) && (unit + 1U < sizeof(k_units) / sizeof(k_units[0]))) {
        value /= 1024.0;
        unit++;
    }
    (void)snprintf(text, 24, (unit == 0) ? "%.0f %s" : "%.1f %s", value, k_units[unit]);
    return text;
}
