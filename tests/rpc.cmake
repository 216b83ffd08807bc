# The gRPC door, driven by a client on the bare C core.
set(_rpc_support rpc/raw_client.c rpc/echo_server.c)
fv_add_test(test_rpc_call unit SOURCES rpc/test_rpc_call.c ${_rpc_support} LIBS fv_rpc PkgConfig::GRPC TIMEOUT 120)
fv_add_test(test_rpc_life unit SOURCES rpc/test_rpc_life.c ${_rpc_support} LIBS fv_rpc PkgConfig::GRPC TIMEOUT 120)
fv_add_test(test_rpc_builtin unit SOURCES rpc/test_rpc_builtin.c ${_rpc_support} LIBS fv_rpc PkgConfig::GRPC TIMEOUT 120)
if(FV_SANITIZE MATCHES thread) # gRPC is not instrumented: without this every hand-over inside it is a "race"
    set_tests_properties(test_rpc_call test_rpc_life test_rpc_builtin PROPERTIES
        ENVIRONMENT "TSAN_OPTIONS=ignore_noninstrumented_modules=1 suppressions=${CMAKE_CURRENT_LIST_DIR}/rpc/tsan.supp")
endif()
