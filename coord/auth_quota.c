/*
 * auth_quota.c - what a principal may do and use.
 */
#include "coord/auth.h"

#include <inttypes.h>

#define BURST_SECONDS 2  /* of bytes_per_second may come at once */
#define DEBT_SECONDS  10 /* the most that what was refused adds to a debt */

bool fv_principal_is_admin(const fv_principal_t *principal)
{
    return (principal == NULL) ||
           (atomic_load_explicit(&principal->role, memory_order_relaxed) == FV_ROLE_ADMIN);
}

bool fv_principal_may_see(const fv_principal_t *principal, const fv_principal_t *owner)
{
    return (principal == owner) || fv_principal_is_admin(principal);
}

static uint64_t limit(const _Atomic(uint64_t) *value)
{
    return atomic_load_explicit(value, memory_order_relaxed);
}

/* ------------------------------------------------------------------ requests */

/* What the bucket holds after `now_us`: it fills with the rate, up to the burst. */
static void fill_bucket(fv_principal_t *principal, uint64_t rate, int64_t now_us)
{
    int64_t burst = (int64_t)(rate * BURST_SECONDS);
    double filled = (double)principal->bucket_bytes +
                    ((double)rate * (double)(now_us - principal->bucket_us) * 1e-6);

    /* the first time it is full */
    principal->bucket_bytes =
        ((principal->bucket_us == 0) || (filled >= (double)burst)) ? burst : (int64_t)filled;
    principal->bucket_us = now_us;
}

fv_status_t fv_principal_check_request(fv_principal_t *principal, int64_t now_us)
{
    uint64_t requests_max = limit(&principal->requests_max);
    uint64_t rate = limit(&principal->bytes_per_second);
    uint64_t n = atomic_load_explicit(&principal->n_requests, memory_order_relaxed);

    if ((requests_max > 0) && (n >= requests_max)) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "quota of %s: %" PRIu64 " requests in flight of %" PRIu64
                       " allowed (requests); wait for answers",
                       principal->name, n, requests_max);
    }
    if (rate == 0) {
        return FV_OK;
    }
    fill_bucket(principal, rate, now_us);
    if (principal->bucket_bytes <=
        0) { /* the last request may overdraw: its size is known too late */
        return fv_fail(FV_ERR_EXHAUSTED,
                       "quota of %s: %" PRIu64 " bytes a second are used up (bytes_per_second); "
                       "try again in %" PRIu64 " ms",
                       principal->name, rate,
                       (((uint64_t)(-principal->bucket_bytes) * 1000U) / rate) + 1U);
    }
    return FV_OK;
}

static int64_t cost(uint64_t n_bytes)
{
    return (n_bytes < FV_REQUEST_BYTES_MIN) ? FV_REQUEST_BYTES_MIN : (int64_t)n_bytes;
}

fv_status_t fv_principal_begin_request(fv_principal_t *principal, uint64_t n_bytes, int64_t now_us)
{
    FV_RETURN_IF_ERR(fv_principal_check_request(principal, now_us));
    (void)atomic_fetch_add_explicit(&principal->n_requests, 1U, memory_order_relaxed);
    if (limit(&principal->bytes_per_second) > 0) {
        principal->bucket_bytes -= cost(n_bytes);
    }
    return FV_OK;
}

void fv_principal_charge(fv_principal_t *principal, uint64_t n_bytes, int64_t now_us)
{
    uint64_t rate = limit(&principal->bytes_per_second);
    int64_t floor_bytes = -(int64_t)(rate * DEBT_SECONDS);

    if (rate == 0) {
        return;
    }
    fill_bucket(principal, rate, now_us);
    if (principal->bucket_bytes - cost(n_bytes) > floor_bytes) {
        principal->bucket_bytes -= cost(n_bytes);
    } else if (principal->bucket_bytes > floor_bytes) { /* a served request may owe more */
        principal->bucket_bytes = floor_bytes;
    }
}

void fv_principal_end_request(fv_principal_t *principal)
{
    (void)atomic_fetch_sub_explicit(&principal->n_requests, 1U, memory_order_relaxed);
}

/* ------------------------------------------------------------------ sessions, KV */

fv_status_t fv_principal_check_session(const fv_principal_t *principal)
{
    uint64_t sessions_max = limit(&principal->sessions_max);

    if ((sessions_max > 0) && (principal->n_sessions >= sessions_max)) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "quota of %s: %" PRIu64 " sessions open of %" PRIu64
                       " allowed (sessions); close some",
                       principal->name, principal->n_sessions, sessions_max);
    }
    return FV_OK;
}

fv_status_t fv_principal_check_model(const fv_principal_t *principal)
{
    uint64_t models_max = limit(&principal->models_max);

    if ((models_max > 0) && (principal->n_models >= models_max)) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "quota of %s: %" PRIu64 " models registered of %" PRIu64
                       " allowed (models); use one that is registered",
                       principal->name, principal->n_models, models_max);
    }
    return FV_OK;
}

fv_status_t fv_principal_check_kv(const fv_principal_t *principal, uint64_t n_bytes)
{
    uint64_t kv_bytes_max = limit(&principal->kv_bytes_max);
    uint64_t used = principal->kv_bytes + principal->kv_bytes_pending;

    if ((kv_bytes_max > 0) && (n_bytes > 0) &&
        ((used >= kv_bytes_max) || (n_bytes > kv_bytes_max - used))) {
        return fv_fail(FV_ERR_EXHAUSTED,
                       "quota of %s: %" PRIu64 " bytes of KV needed, %" PRIu64 " used of %" PRIu64
                       " allowed (kv_bytes); close or truncate sessions",
                       principal->name, n_bytes, used, kv_bytes_max);
    }
    return FV_OK;
}
