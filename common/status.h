/*
 * status.h - the one error type, and the text that travels with it.
 *
 * A status is born once, by fv_fail(), which records a text in a thread-local buffer; functions that
 * only pass it on add nothing. A status that crosses threads or ranks travels with its text as a
 * fv_error_t. User-visible texts name the field, what was given and what was expected.
 */
#ifndef FV_COMMON_STATUS_H
#define FV_COMMON_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

/*
 * X(code, value, text). Values -1..-16 are the negated gRPC status codes, so that the RPC door needs
 * no table (fv_status_grpc()); values below -100 are the inside's own and reach clients as UNAVAILABLE
 * (worker or cluster lost) or INTERNAL.
 */
#define FV_STATUS_LIST(X)                                      \
    X(FV_OK, 0, "ok")                                          \
    X(FV_INPROGRESS, 1, "in progress")                         \
    X(FV_ERR_CANCELLED, -1, "cancelled")                       \
    X(FV_ERR_UNKNOWN, -2, "unknown")                           \
    X(FV_ERR_INVALID_ARG, -3, "invalid argument")              \
    X(FV_ERR_DEADLINE, -4, "deadline exceeded")                \
    X(FV_ERR_NOT_FOUND, -5, "not found")                       \
    X(FV_ERR_ALREADY_EXISTS, -6, "already exists")             \
    X(FV_ERR_PERMISSION, -7, "permission denied")              \
    X(FV_ERR_EXHAUSTED, -8, "resource exhausted")              \
    X(FV_ERR_PRECONDITION, -9, "failed precondition")          \
    X(FV_ERR_ABORTED, -10, "aborted")                          \
    X(FV_ERR_OUT_OF_RANGE, -11, "out of range")                \
    X(FV_ERR_UNIMPLEMENTED, -12, "unimplemented")              \
    X(FV_ERR_INTERNAL, -13, "internal")                        \
    X(FV_ERR_UNAVAILABLE, -14, "unavailable")                  \
    X(FV_ERR_DATA_LOSS, -15, "data loss")                      \
    X(FV_ERR_UNAUTHENTICATED, -16, "unauthenticated")          \
    X(FV_ERR_NO_MEMORY, -101, "out of host memory")            \
    X(FV_ERR_SYSTEM, -102, "system call failed")               \
    X(FV_ERR_MPI, -103, "MPI error")                           \
    X(FV_ERR_RANK_LOST, -104, "a rank was lost")               \
    X(FV_ERR_TIMED_OUT, -105, "a rank did not answer in time") \
    X(FV_ERR_CUDA, -107, "CUDA error")                         \
    X(FV_ERR_NCCL, -108, "NCCL error")                         \
    X(FV_ERR_PROTOCOL, -106, "bad message between coordinator and worker")

typedef enum fv_status {
#define FV_STATUS_ENUM(name, value, text) name = (value),
    FV_STATUS_LIST(FV_STATUS_ENUM)
#undef FV_STATUS_ENUM
} fv_status_t;

#define FV_ERROR_TEXT_BYTES 256

/* A status with its text, to carry across threads and ranks. Plain data. */
typedef struct fv_error {
    int status;                     /* fv_status_t */
    char text[FV_ERROR_TEXT_BYTES]; /* NUL-terminated; "" when status is FV_OK */
} fv_error_t;

const char *fv_status_str(fv_status_t status);

/* The gRPC status code (0..16) a client sees for `status`. */
int fv_status_grpc(fv_status_t status);

/* Records the text of a new error for this thread and returns `status`. Thread: any. */
__attribute__((format(printf, 2, 3))) fv_status_t fv_fail(fv_status_t status, const char *fmt, ...);

/* The text of the last error of this thread; "" when there was none. */
const char *fv_error_context(void);

/* Captures this thread's last error text together with `status`. */
fv_error_t fv_error_capture(fv_status_t status);

/* The one macro that returns. Only for functions that hold nothing to release. */
#define FV_RETURN_IF_ERR(expr)           \
    do {                                 \
        fv_status_t fv_status_ = (expr); \
        if (fv_status_ != FV_OK) {       \
            return fv_status_;           \
        }                                \
    } while (0)

#define FV_MUST_CHECK __attribute__((warn_unused_result))

/* Programmer errors, on in all builds; input from outside is checked, never asserted. */
void fv_assert_failed(const char *file, int line, const char *expr) __attribute__((noreturn));
#define FV_ASSERT(x) ((x) ? (void)0 : fv_assert_failed(__FILE__, __LINE__, #x))

#ifdef __cplusplus
}
#endif

#endif /* FV_COMMON_STATUS_H */
