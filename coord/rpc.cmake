# The gRPC door. Reflection serves, besides our API, the public APIs that the door answers itself.
set(_rpc_gen ${PROJECT_BINARY_DIR}/gen/rpc_descriptor.c)
set(_rpc_protos grpc/health/v1/health.proto grpc/reflection/v1/reflection.proto
    grpc/reflection/v1alpha/reflection.proto)
list(TRANSFORM _rpc_protos PREPEND ${PROJECT_SOURCE_DIR}/proto/ OUTPUT_VARIABLE _rpc_proto_files)
add_custom_command(
    OUTPUT ${_rpc_gen}
    COMMAND ${FV_PROTOC} -I ${PROJECT_SOURCE_DIR}/proto
            --descriptor_set_out=${PROJECT_BINARY_DIR}/gen/rpc.pb ${_rpc_protos}
    COMMAND ${CMAKE_COMMAND} -DINPUT=${PROJECT_BINARY_DIR}/gen/rpc.pb -DOUTPUT=${_rpc_gen}
            -P ${CMAKE_CURRENT_SOURCE_DIR}/rpc_embed.cmake
    DEPENDS ${_rpc_proto_files} ${CMAKE_CURRENT_SOURCE_DIR}/rpc_embed.cmake VERBATIM)

# Who may call: principals, tokens, quotas.
fv_add_library(fv_auth HEADERS auth.h reload.h SOURCES auth.c auth_quota.c reload.c LIBS fv_common fv_secret
               PRIVATE_LIBS Threads::Threads)

fv_add_library(fv_rpc HEADERS rpc.h rpc_internal.h rpc_pb.h
               SOURCES rpc_server.c rpc_loop.c rpc_call.c rpc_event.c rpc_accept.c rpc_admit.c rpc_waiting.c rpc_tls.c rpc_message.c rpc_method.c rpc_listen.c
                       rpc_health.c rpc_reflection.c rpc_pb.c ${_rpc_gen}
               LIBS fv_proto fv_auth PRIVATE_LIBS PkgConfig::GRPC PkgConfig::CRYPTO Threads::Threads)
