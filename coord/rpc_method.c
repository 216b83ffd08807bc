/*
 * rpc_method.c - the table of methods that the door knows.
 */
#include "coord/rpc_internal.h"

#include <string.h>

#define ATTENTION "/fovea.v1.Attention/"
#define CLUSTER   "/fovea.v1.Cluster/"
#define HEALTH    "/grpc.health.v1.Health/"

static const fv_method_info_t k_methods[] = {
    {ATTENTION "Attend", FV_METHOD_ATTEND, FV_CALL_BIDI, FV_ACCESS_USER},
    {ATTENTION "AttendOnce", FV_METHOD_ATTEND_ONCE, FV_CALL_UNARY, FV_ACCESS_USER},
    {ATTENTION "RegisterModel", FV_METHOD_REGISTER_MODEL, FV_CALL_UNARY, FV_ACCESS_USER},
    {ATTENTION "OpenSession", FV_METHOD_OPEN_SESSION, FV_CALL_UNARY, FV_ACCESS_USER},
    {ATTENTION "ForkSession", FV_METHOD_FORK_SESSION, FV_CALL_UNARY, FV_ACCESS_USER},
    {ATTENTION "TruncateSession", FV_METHOD_TRUNCATE_SESSION, FV_CALL_UNARY, FV_ACCESS_FREE},
    {ATTENTION "CloseSession", FV_METHOD_CLOSE_SESSION, FV_CALL_UNARY, FV_ACCESS_FREE},
    {ATTENTION "GetSession", FV_METHOD_GET_SESSION, FV_CALL_UNARY, FV_ACCESS_STATUS},
    {ATTENTION "ListSessions", FV_METHOD_LIST_SESSIONS, FV_CALL_UNARY, FV_ACCESS_STATUS},
    {CLUSTER "GetStatus", FV_METHOD_GET_STATUS, FV_CALL_UNARY, FV_ACCESS_STATUS},
    {CLUSTER "GetPlacement", FV_METHOD_GET_PLACEMENT, FV_CALL_UNARY, FV_ACCESS_STATUS},
    {CLUSTER "WatchStatus", FV_METHOD_WATCH_STATUS, FV_CALL_SERVER_STREAM, FV_ACCESS_STATUS},
    {CLUSTER "Drain", FV_METHOD_DRAIN, FV_CALL_UNARY, FV_ACCESS_ADMIN},
    {HEALTH "Check", FV_METHOD_HEALTH_CHECK, FV_CALL_UNARY, FV_ACCESS_ANYBODY},
    {HEALTH "Watch", FV_METHOD_HEALTH_WATCH, FV_CALL_SERVER_STREAM, FV_ACCESS_ANYBODY},
    {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", FV_METHOD_REFLECTION_V1,
     FV_CALL_BIDI, FV_ACCESS_STATUS},
    {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", FV_METHOD_REFLECTION_V1ALPHA,
     FV_CALL_BIDI, FV_ACCESS_STATUS},
};
_Static_assert(sizeof(k_methods) / sizeof(k_methods[0]) == FV_METHOD_END, "a method has no path");

const fv_method_info_t *fv_method_find(const char *path, size_t n_chars)
{
    for (size_t i = 0; i < FV_METHOD_END; i++) {
        const char *known = k_methods[i].path;
        if ((strlen(known) == n_chars) && (memcmp(known, path, n_chars) == 0)) {
            return &k_methods[i];
        }
    }
    return NULL;
}
