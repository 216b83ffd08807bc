/*
 * staging.c - free lists by power of two; a small header in front of each buffer says where it belongs.
 */
#include "coord/staging.h"

#include <pthread.h>
#include <stdlib.h>

#define ALIGNMENT   64U
#define CLASS_FIRST 12 /* 4 KiB */
#define CLASS_LAST  40
/* A class keeps this many bytes of idle buffers (at least one buffer); the rest goes back to malloc. */
#define IDLE_BYTES_MAX ((size_t)256 << 20)

typedef struct fv_buffer {
    fv_staging_t *owner;
    struct fv_buffer *next;
    size_t n_bytes; /* payload */
    int size_class;
} fv_buffer_t;

_Static_assert(sizeof(fv_buffer_t) <= ALIGNMENT, "the header fits in front of the payload");

struct fv_staging {
    pthread_mutex_t lock;
    size_t bytes_max, bytes_out;
    fv_buffer_t *idle[CLASS_LAST + 1];
    size_t n_idle[CLASS_LAST + 1];
};

fv_status_t fv_staging_create(size_t bytes_max, fv_staging_t **out)
{
    fv_staging_t *staging = calloc(1, sizeof(*staging));

    if (staging == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "staging");
    }
    (void)pthread_mutex_init(&staging->lock, NULL);
    staging->bytes_max = bytes_max;
    *out = staging;
    return FV_OK;
}

void fv_staging_destroy(fv_staging_t *staging)
{
    if (staging == NULL) {
        return;
    }
    FV_ASSERT(staging->bytes_out == 0);
    for (int c = CLASS_FIRST; c <= CLASS_LAST; c++) {
        while (staging->idle[c] != NULL) {
            fv_buffer_t *buffer = staging->idle[c];
            staging->idle[c] = buffer->next;
            free(buffer);
        }
    }
    (void)pthread_mutex_destroy(&staging->lock);
    free(staging);
}

static int class_of(size_t n_bytes)
{
    int c = CLASS_FIRST;

    while ((c < CLASS_LAST) && (((size_t)1 << c) < n_bytes)) {
        c++;
    }
    return c;
}

fv_status_t fv_staging_take(fv_staging_t *staging, size_t n_bytes, bool may_pass, void **out)
{
    int c = class_of(n_bytes);
    size_t class_bytes = (size_t)1 << c;

    (void)pthread_mutex_lock(&staging->lock);
    size_t free_bytes =
        (staging->bytes_out < staging->bytes_max) ? (staging->bytes_max - staging->bytes_out) : 0;
    if (!may_pass && (class_bytes > free_bytes)) {
        (void)pthread_mutex_unlock(&staging->lock);
        return fv_fail(FV_ERR_EXHAUSTED,
                       "memory for requests in flight: %zu bytes needed, %zu free of %zu "
                       "(request_memory); wait for answers",
                       class_bytes, free_bytes, staging->bytes_max);
    }
    fv_buffer_t *buffer = staging->idle[c];
    if (buffer != NULL) {
        staging->idle[c] = buffer->next;
        staging->n_idle[c]--;
    }
    staging->bytes_out += class_bytes;
    (void)pthread_mutex_unlock(&staging->lock);
    if (buffer == NULL) {
        buffer = aligned_alloc(ALIGNMENT, ALIGNMENT + class_bytes);
    }
    if (buffer == NULL) {
        (void)pthread_mutex_lock(&staging->lock);
        staging->bytes_out -= class_bytes;
        (void)pthread_mutex_unlock(&staging->lock);
        return fv_fail(FV_ERR_NO_MEMORY, "staging buffer of %zu bytes", class_bytes);
    }
    *buffer = (fv_buffer_t){.owner = staging, .n_bytes = class_bytes, .size_class = c};
    *out = (unsigned char *)buffer + ALIGNMENT;
    return FV_OK;
}

void fv_staging_give(void *payload)
{
    if (payload == NULL) {
        return;
    }
    fv_buffer_t *buffer = (fv_buffer_t *)(void *)((unsigned char *)payload - ALIGNMENT);
    fv_staging_t *staging = buffer->owner;
    int c = buffer->size_class;

    (void)pthread_mutex_lock(&staging->lock);
    staging->bytes_out -= buffer->n_bytes;
    bool keep = (staging->n_idle[c] == 0) ||
                ((staging->n_idle[c] + 1U) * buffer->n_bytes <= IDLE_BYTES_MAX);
    if (keep) {
        buffer->next = staging->idle[c];
        staging->idle[c] = buffer;
        staging->n_idle[c]++;
    }
    (void)pthread_mutex_unlock(&staging->lock);
    if (!keep) {
        free(buffer);
    }
}

size_t fv_staging_bytes(const fv_staging_t *staging)
{
    return staging->bytes_out;
}
