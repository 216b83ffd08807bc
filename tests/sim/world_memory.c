/*
 * world_memory.c - what a process has: memory, mappings, descriptors. Its death takes them away, and nothing else.
 *
 * What is written to files and mappings stays, as it does when a real process is killed.
 */
#define _GNU_SOURCE

#include "common/status.h"
#include "tests/sim/world.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

#define TABLE_SIZE   (1U << 14) /* a power of two, far more than is ever in use */
#define MAPPINGS_MAX 256
#define FDS_MAX      1024

void *__real_malloc(size_t n_bytes);
void *__real_calloc(size_t n, size_t n_bytes);
void *__real_realloc(void *memory, size_t n_bytes);
void *__real_aligned_alloc(size_t alignment, size_t n_bytes);
int __real_posix_memalign(void **out, size_t alignment, size_t n_bytes);
void __real_free(void *memory);
void *__real_mmap(void *at, size_t n_bytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t n_bytes);
int __real_open(const char *path, int flags, ...);
int __real_close(int fd);
int __real_eventfd(unsigned count, int flags);

void *__wrap_malloc(size_t n_bytes);
void *__wrap_calloc(size_t n, size_t n_bytes);
void *__wrap_realloc(void *memory, size_t n_bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t n_bytes);
int __wrap_posix_memalign(void **out, size_t alignment, size_t n_bytes);
void __wrap_free(void *memory);
char *__wrap_strdup(const char *text);
char *__real_strdup(const char *text);
void *__wrap_mmap(void *at, size_t n_bytes, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void *at, size_t n_bytes);
int __wrap_open(const char *path, int flags, ...);
int __wrap_close(int fd);
int __wrap_eventfd(unsigned count, int flags);
int sim_socket_close(int fd); /* world_socket.c */

/* Blocks by address, open addressing. */
static struct {
    void *at;
    const sim_process_t *owner;
} s_blocks[TABLE_SIZE];
static uint32_t s_n_blocks;

static struct {
    void *at;
    size_t n_bytes;
    const sim_process_t *owner;
} s_mappings[MAPPINGS_MAX];

static const sim_process_t *s_fds[FDS_MAX];

void *sim_alloc(size_t n_bytes)
{
    void *memory = __real_malloc(n_bytes);

    FV_ASSERT(memory != NULL);
    return memory;
}

void sim_free(void *memory)
{
    __real_free(memory);
}

/* ------------------------------------------------------------------ blocks */

static uint32_t place_of(const void *at)
{
    uint64_t x = (uint64_t)(uintptr_t)at >> 4;

    return (uint32_t)((x * 0x9e3779b97f4a7c15U) >> 40) % TABLE_SIZE;
}

static void *note(void *at)
{
    if ((at == NULL) || (sim_current() == NULL)) {
        return at;
    }
    uint32_t i = place_of(at);
    while (s_blocks[i].at != NULL) {
        i = (i + 1U) % TABLE_SIZE;
    }
    s_blocks[i].at = at;
    s_blocks[i].owner = sim_current();
    FV_ASSERT(++s_n_blocks < TABLE_SIZE / 2U);
    return at;
}

/* Takes out entry i and closes the gap. */
static void take_out(uint32_t i)
{
    uint32_t gap = i;

    s_n_blocks--;
    for (uint32_t k = (i + 1U) % TABLE_SIZE; s_blocks[k].at != NULL; k = (k + 1U) % TABLE_SIZE) {
        uint32_t home = place_of(s_blocks[k].at);
        if (((k - home) % TABLE_SIZE) >= ((k - gap) % TABLE_SIZE)) {
            s_blocks[gap] = s_blocks[k];
            gap = k;
        }
    }
    s_blocks[gap].at = NULL;
}

static void forget(const void *at)
{
    for (uint32_t i = place_of(at); s_blocks[i].at != NULL; i = (i + 1U) % TABLE_SIZE) {
        if (s_blocks[i].at == at) {
            take_out(i);
            return;
        }
    }
}

void *__wrap_malloc(size_t n_bytes)
{
    return note(__real_malloc(n_bytes));
}

void *__wrap_calloc(size_t n, size_t n_bytes)
{
    return note(__real_calloc(n, n_bytes));
}

void *__wrap_realloc(void *memory, size_t n_bytes)
{
    if (memory != NULL) {
        forget(memory);
    }
    return note(__real_realloc(memory, n_bytes));
}

void *__wrap_aligned_alloc(size_t alignment, size_t n_bytes)
{
    return note(__real_aligned_alloc(alignment, n_bytes));
}

int __wrap_posix_memalign(void **out, size_t alignment, size_t n_bytes)
{
    int rc = __real_posix_memalign(out, alignment, n_bytes);

    (void)note((rc == 0) ? *out : NULL);
    return rc;
}

char *__wrap_strdup(const char *text)
{
    return note(__real_strdup(text));
}

void __wrap_free(void *memory)
{
    if (memory != NULL) {
        forget(memory);
        __real_free(memory);
    }
}

/* ------------------------------------------------------------------ mappings, descriptors */

void *__wrap_mmap(void *at, size_t n_bytes, int protection, int flags, int fd, off_t offset)
{
    void *mapped = __real_mmap(at, n_bytes, protection, flags, fd, offset);

    for (int i = 0; (mapped != MAP_FAILED) && (sim_current() != NULL); i++) {
        FV_ASSERT(i < MAPPINGS_MAX);
        if (s_mappings[i].at == NULL) {
            s_mappings[i].at = mapped;
            s_mappings[i].n_bytes = n_bytes;
            s_mappings[i].owner = sim_current();
            break;
        }
    }
    return mapped;
}

int __wrap_munmap(void *at, size_t n_bytes)
{
    for (int i = 0; i < MAPPINGS_MAX; i++) {
        if (s_mappings[i].at == at) {
            s_mappings[i].at = NULL;
        }
    }
    return __real_munmap(at, n_bytes);
}

static int note_fd(int fd)
{
    if ((fd >= 0) && (sim_current() != NULL)) {
        FV_ASSERT(fd < FDS_MAX);
        s_fds[fd] = sim_current();
    }
    return fd;
}

int __wrap_open(const char *path, int flags, ...)
{
    va_list more;

    va_start(more, flags);
    unsigned mode = ((flags & O_CREAT) != 0) ? va_arg(more, unsigned) : 0U;
    va_end(more);
    return note_fd(__real_open(path, flags, mode));
}

int __wrap_eventfd(unsigned count, int flags)
{
    return note_fd(__real_eventfd(count, flags));
}

int __wrap_close(int fd)
{
    if (fd >= SIM_FDS_FROM) {
        return sim_socket_close(fd);
    }
    if ((fd >= 0) && (fd < FDS_MAX)) {
        s_fds[fd] = NULL;
    }
    return __real_close(fd);
}

/* ------------------------------------------------------------------ death */

void sim_memory_drop(const sim_process_t *process)
{
    for (uint32_t i = 0; i < TABLE_SIZE; i++) {
        while ((s_blocks[i].at != NULL) && (s_blocks[i].owner == process)) {
            void *at = s_blocks[i].at; /* another one may move into its place */
            take_out(i);
            __real_free(at);
        }
    }
    for (int i = 0; i < MAPPINGS_MAX; i++) {
        if ((s_mappings[i].at != NULL) && (s_mappings[i].owner == process)) {
            (void)__real_munmap(s_mappings[i].at, s_mappings[i].n_bytes);
            s_mappings[i].at = NULL;
        }
    }
    for (int fd = 0; fd < FDS_MAX; fd++) {
        if (s_fds[fd] == process) {
            (void)__real_close(fd);
            s_fds[fd] = NULL;
        }
    }
}
