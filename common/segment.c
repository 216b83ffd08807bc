/*
 * segment.c - a slot's KV pages: a file of memory, mapped where it is used, allocated ahead.
 *
 * A file of memory that grows by being touched kills its process (SIGBUS) when the file system is full. So everything is
 * allocated by fallocate() before it is touched, which says so instead: ahead, by a thread of low priority, or by whoever
 * is about to touch it.
 */
#define _GNU_SOURCE /* fallocate, madvise, gettid */

#include "common/log.h"
#include "common/store.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define HUGE_BYTES      ((size_t)2 << 20)
#define CHUNK_BYTES     ((size_t)8 << 20) /* allocated at once: about 4 ms */
#define ADVISE_WRITE    23                /* MADV_POPULATE_WRITE, Linux 5.14 */
#define ADVISE_COLLAPSE 25                /* MADV_COLLAPSE, Linux 6.1 */

struct fv_segment {
    char path[FV_STORE_PATH_BYTES];
    int fd;
    uint8_t *map, *base;       /* base: aligned to huge pages */
    size_t map_bytes, n_bytes; /* n_bytes: with the slack */
    pthread_mutex_t lock;      /* of allocating */
    _Atomic(size_t) ready;     /* bytes allocated, from the first on */
    pthread_t thread;
    bool has_thread;
    atomic_bool is_closing;
};

static fv_status_t check_space(const fv_segment_t *segment, const struct stat *info)
{
    struct statvfs fs;

    if (fstatvfs(segment->fd, &fs) != 0) {
        return FV_OK; /* then allocating tells */
    }
    uint64_t n_free = (uint64_t)fs.f_bavail * fs.f_frsize + (uint64_t)info->st_blocks * 512U;
    if (n_free >= segment->n_bytes) {
        return FV_OK;
    }
    return fv_fail(
        FV_ERR_EXHAUSTED,
        "%s: %zu MiB needed (kv_memory), its file system has %zu MiB free: make it larger "
        "(of a container: --shm-size), set another store_dir, a smaller kv_memory, or "
        "durability to none",
        segment->path, segment->n_bytes >> 20U, (size_t)(n_free >> 20U));
}

static fv_status_t open_file(fv_segment_t *segment, bool *out_is_new)
{
    struct stat info;

    segment->fd = open(segment->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if ((segment->fd < 0) || (fstat(segment->fd, &info) != 0)) {
        return fv_fail(FV_ERR_SYSTEM, "%s: %s", segment->path, strerror(errno));
    }
    *out_is_new = info.st_size == 0;
    if (!*out_is_new && ((size_t)info.st_size != segment->n_bytes)) {
        return fv_fail(FV_ERR_PRECONDITION, "%s: given %lld bytes, expected %zu (kv_memory)",
                       segment->path, (long long)info.st_size, segment->n_bytes);
    }
    FV_RETURN_IF_ERR(check_space(segment, &info));
    if (*out_is_new && (ftruncate(segment->fd, (off_t)segment->n_bytes) != 0)) {
        return fv_fail((errno == EFBIG) ? FV_ERR_EXHAUSTED : FV_ERR_SYSTEM, "%s: %s", segment->path,
                       strerror(errno));
    }
    return FV_OK;
}

static fv_status_t map_file(fv_segment_t *segment)
{
    size_t n_map = segment->n_bytes + HUGE_BYTES;
    void *map = mmap(NULL, n_map, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (map == MAP_FAILED) {
        return fv_fail(FV_ERR_NO_MEMORY, "%s: mmap of %zu bytes: %s", segment->path, n_map,
                       strerror(errno));
    }
    segment->map = map;
    segment->map_bytes = n_map;
    uint8_t *base = segment->map + (HUGE_BYTES - (uintptr_t)map % HUGE_BYTES) % HUGE_BYTES;
    if (mmap(base, segment->n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, segment->fd,
             0) == MAP_FAILED) {
        return fv_fail(FV_ERR_NO_MEMORY, "%s: mmap of %zu bytes: %s", segment->path,
                       segment->n_bytes, strerror(errno));
    }
    segment->base = base;
    (void)madvise(base, segment->n_bytes, MADV_HUGEPAGE);
    return FV_OK;
}

fv_status_t fv_segment_open(const char *path,
                            size_t n_bytes,
                            size_t slack_bytes,
                            fv_segment_t **out,
                            bool *out_is_new)
{
    fv_segment_t *segment = calloc(1, sizeof(*segment));

    if (segment == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "segment");
    }
    segment->fd = -1;
    segment->n_bytes = n_bytes + slack_bytes;
    (void)pthread_mutex_init(&segment->lock, NULL);
    (void)snprintf(segment->path, sizeof(segment->path), "%s", path);
    fv_status_t status = open_file(segment, out_is_new);
    if (status == FV_OK) {
        status = map_file(segment);
    }
    if (status != FV_OK) {
        fv_segment_close(segment);
        return status;
    }
    *out = segment;
    return FV_OK;
}

void fv_segment_close(fv_segment_t *segment)
{
    if (segment == NULL) {
        return;
    }
    if (segment->has_thread) {
        atomic_store(&segment->is_closing, true);
        (void)pthread_join(segment->thread, NULL);
    }
    if (segment->map != NULL) {
        (void)munmap(segment->map, segment->map_bytes);
    }
    if (segment->fd >= 0) {
        (void)close(segment->fd);
    }
    (void)pthread_mutex_destroy(&segment->lock);
    free(segment);
}

void fv_segment_remove(fv_segment_t *segment)
{
    if (segment != NULL) {
        (void)unlink(segment->path);
        fv_segment_close(segment);
    }
}

uint8_t *fv_segment_base(const fv_segment_t *segment)
{
    return segment->base;
}

/* One chunk more. Lock held. */
static fv_status_t allocate_chunk(fv_segment_t *segment)
{
    size_t at = atomic_load_explicit(&segment->ready, memory_order_relaxed);
    size_t n = segment->n_bytes - at;

    n = (n < CHUNK_BYTES) ? n : CHUNK_BYTES;
    if ((fallocate(segment->fd, 0, (off_t)at, (off_t)n) != 0) && (errno != EOPNOTSUPP)) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "%s: %zu of %zu MiB, then its file system had no more room: %s",
                       segment->path, at >> 20U, segment->n_bytes >> 20U, strerror(errno));
    }
    atomic_store_explicit(&segment->ready, at + n, memory_order_release);
    return FV_OK;
}

fv_status_t fv_segment_ensure(fv_segment_t *segment, size_t end)
{
    fv_status_t status = FV_OK;

    end = (end < segment->n_bytes) ? end : segment->n_bytes;
    while ((status == FV_OK) &&
           (atomic_load_explicit(&segment->ready, memory_order_acquire) < end)) {
        (void)pthread_mutex_lock(&segment->lock);
        if (atomic_load_explicit(&segment->ready, memory_order_relaxed) < end) {
            status = allocate_chunk(segment);
        }
        (void)pthread_mutex_unlock(&segment->lock);
    }
    return status;
}

fv_status_t fv_segment_ensure_range(fv_segment_t *segment, size_t begin, size_t end)
{
    end = (end < segment->n_bytes) ? end : segment->n_bytes;
    if ((begin < end) && (fallocate(segment->fd, 0, (off_t)begin, (off_t)(end - begin)) != 0) &&
        (errno != EOPNOTSUPP)) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "%s: %zu MiB from %zu MiB on, its file system has no room: %s",
                       segment->path, (end - begin) >> 20U, begin >> 20U, strerror(errno));
    }
    return FV_OK;
}

/* Allocates, maps, and makes huge pages of it where the kernel can. */
static void *populate(void *arg)
{
    fv_segment_t *segment = arg;
    size_t at = 0;

    fv_log_thread_name("populate");
    (void)setpriority(PRIO_PROCESS, (id_t)gettid(), 10);
    while ((at < segment->n_bytes) && !atomic_load(&segment->is_closing)) {
        size_t n = segment->n_bytes - at;
        n = (n < CHUNK_BYTES) ? n : CHUNK_BYTES;
        if (fv_segment_ensure(segment, at + n) != FV_OK) {
            fv_warn("durability: %s", fv_error_context());
            break;
        }
        (void)madvise(segment->base + at, n, ADVISE_WRITE);
        (void)madvise(segment->base + at, n / HUGE_BYTES * HUGE_BYTES, ADVISE_COLLAPSE);
        at += n;
    }
    return NULL;
}

fv_status_t fv_segment_populate(fv_segment_t *segment)
{
    if (pthread_create(&segment->thread, NULL, populate, segment) != 0) {
        return fv_fail(FV_ERR_SYSTEM, "%s: no thread to allocate it ahead", segment->path);
    }
    segment->has_thread = true;
    return FV_OK;
}
