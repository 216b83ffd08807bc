/*
 * staging.c - free lists by power of two; a small header in front of each buffer says where it belongs.
 */
#include "coord/staging.h"

#include <pthread.h>
#include <stdlib.h>

#define ALIGNMENT   64U
#define CLASS_FIRST 12 /* 4 KiB */
#define CLASS_LAST  40
#define CLASS_EARLY 20 /* 1 MiB: chunks up to here are there from the start */
#define CHUNK_BYTES ((size_t)2 << 20)
/* A class keeps this many bytes of idle buffers (at least one buffer); the rest goes back to malloc. */
#define IDLE_BYTES_MAX ((size_t)256 << 20)

typedef struct fv_buffer {
    fv_staging_t *owner;
    struct fv_buffer *next;
    size_t n_bytes; /* payload */
    int size_class;
    bool is_kept; /* part of a chunk */
} fv_buffer_t;

/* Stands in front of a chunk's buffers. */
typedef struct chunk {
    struct chunk *next;
} chunk_t;

_Static_assert(sizeof(fv_buffer_t) <= ALIGNMENT, "the header fits in front of the payload");

struct fv_staging {
    pthread_mutex_t lock;
    size_t bytes_max, bytes_out;
    fv_staging_memory_t memory; /* alloc NULL: malloc */
    chunk_t *chunks;
    size_t chunk_bytes;
    fv_buffer_t *idle[CLASS_LAST + 1];
    size_t n_idle[CLASS_LAST + 1];
};

/* Bytes of a chunk of this class: at least one buffer. */
static size_t chunk_bytes_of(int size_class)
{
    const size_t each = ALIGNMENT + ((size_t)1 << size_class);

    return ALIGNMENT + each * ((each < CHUNK_BYTES) ? (CHUNK_BYTES / each) : 1U);
}

static fv_buffer_t *pop_idle(fv_staging_t *staging, int size_class)
{
    fv_buffer_t *buffer = staging->idle[size_class];

    if (buffer != NULL) {
        staging->idle[size_class] = buffer->next;
        staging->n_idle[size_class]--;
    }
    return buffer;
}

static void push_idle(fv_staging_t *staging, fv_buffer_t *buffer)
{
    buffer->next = staging->idle[buffer->size_class];
    staging->idle[buffer->size_class] = buffer;
    staging->n_idle[buffer->size_class]++;
}

/* A chunk's buffers become idle, but the first, which is returned; NULL when there is no chunk to be had. */
static fv_buffer_t *grow_class(fv_staging_t *staging, int size_class)
{
    const size_t n_bytes = chunk_bytes_of(size_class);
    const size_t each = ALIGNMENT + ((size_t)1 << size_class);
    fv_buffer_t *first = NULL;
    void *memory = NULL;

    (void)pthread_mutex_lock(&staging->lock);
    bool may =
        (staging->memory.alloc != NULL) && (n_bytes <= staging->bytes_max - staging->chunk_bytes);
    staging->chunk_bytes += may ? n_bytes : 0U;
    (void)pthread_mutex_unlock(&staging->lock);
    if (!may) {
        return NULL;
    }
    fv_status_t status = staging->memory.alloc(staging->memory.ctx, n_bytes, &memory);
    (void)pthread_mutex_lock(&staging->lock);
    if (status != FV_OK) {
        staging->chunk_bytes -= n_bytes;
    } else {
        chunk_t *chunk = memory;

        chunk->next = staging->chunks;
        staging->chunks = chunk;
        for (size_t at = ALIGNMENT; at < n_bytes; at += each) {
            fv_buffer_t *buffer = (fv_buffer_t *)(void *)((unsigned char *)memory + at);

            *buffer = (fv_buffer_t){.owner = staging, .size_class = size_class, .is_kept = true};
            if (first == NULL) {
                first = buffer;
            } else {
                push_idle(staging, buffer);
            }
        }
    }
    (void)pthread_mutex_unlock(&staging->lock);
    return first;
}

fv_status_t
fv_staging_create(size_t bytes_max, const fv_staging_memory_t *memory, fv_staging_t **out)
{
    fv_staging_t *staging = calloc(1, sizeof(*staging));

    if (staging == NULL) {
        return fv_fail(FV_ERR_NO_MEMORY, "staging");
    }
    (void)pthread_mutex_init(&staging->lock, NULL);
    staging->bytes_max = bytes_max;
    if (memory != NULL) {
        staging->memory = *memory;
    }
    for (int c = CLASS_FIRST; c <= CLASS_EARLY; c++) {
        fv_buffer_t *buffer = grow_class(staging, c);

        if (buffer != NULL) {
            push_idle(staging, buffer);
        }
    }
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
        for (fv_buffer_t *buffer = pop_idle(staging, c); buffer != NULL;
             buffer = pop_idle(staging, c)) {
            if (!buffer->is_kept) {
                free(buffer);
            }
        }
    }
    while (staging->chunks != NULL) {
        chunk_t *chunk = staging->chunks;

        staging->chunks = chunk->next;
        staging->memory.free(staging->memory.ctx, chunk);
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
    fv_buffer_t *buffer = pop_idle(staging, c);
    staging->bytes_out += class_bytes;
    (void)pthread_mutex_unlock(&staging->lock);
    if (buffer == NULL) {
        buffer = grow_class(staging, c);
    }
    bool is_kept = (buffer != NULL) && buffer->is_kept;
    if (buffer == NULL) {
        buffer = aligned_alloc(ALIGNMENT, ALIGNMENT + class_bytes);
    }
    if (buffer == NULL) {
        (void)pthread_mutex_lock(&staging->lock);
        staging->bytes_out -= class_bytes;
        (void)pthread_mutex_unlock(&staging->lock);
        return fv_fail(FV_ERR_NO_MEMORY, "staging buffer of %zu bytes", class_bytes);
    }
    *buffer = (fv_buffer_t){
        .owner = staging, .n_bytes = class_bytes, .size_class = c, .is_kept = is_kept};
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
    bool keep = buffer->is_kept || (staging->n_idle[c] == 0) ||
                ((staging->n_idle[c] + 1U) * buffer->n_bytes <= IDLE_BYTES_MAX);
    if (keep) {
        push_idle(staging, buffer);
    }
    (void)pthread_mutex_unlock(&staging->lock);
    if (!keep) {
        free(buffer);
    }
}

void fv_staging_abandon(void *payload)
{
    if (payload == NULL) {
        return;
    }
    fv_buffer_t *buffer = (fv_buffer_t *)(void *)((unsigned char *)payload - ALIGNMENT);

    (void)pthread_mutex_lock(&buffer->owner->lock);
    buffer->owner->bytes_out -= buffer->n_bytes;
    (void)pthread_mutex_unlock(&buffer->owner->lock);
}

size_t fv_staging_bytes(const fv_staging_t *staging)
{
    return staging->bytes_out;
}
