/*
 * rpc_reflection.c - server reflection (v1 and v1alpha, the same messages) over the descriptors that protoc
 * wrote at build time: our API, and the public APIs of health and reflection themselves.
 *
 * Field numbers of google/protobuf/descriptor.proto and of the reflection API are named where used; both
 * are published and never change.
 */
#include "coord/rpc_internal.h"
#include "coord/rpc_pb.h"
#include "proto/descriptor.h"

#include <stdlib.h>
#include <string.h>

#define GRPC_INVALID_ARGUMENT   3
#define GRPC_NOT_FOUND          5
#define GRPC_RESOURCE_EXHAUSTED 8

/* FileDescriptorSet */
#define SET_FILE 1U
/* FileDescriptorProto */
#define FILE_NAME    1U
#define FILE_PACKAGE 2U
#define FILE_SERVICE 6U
/* every descriptor */
#define ANY_NAME 1U
/* EnumDescriptorProto */
#define ENUM_VALUE 2U
/* ServerReflectionRequest */
#define ASK_FILE       3U
#define ASK_SYMBOL     4U
#define ASK_EXTENSION  5U
#define ASK_EXTENSIONS 6U
#define ASK_SERVICES   7U
/* ServerReflectionResponse */
#define ANSWER_REQUEST    2U
#define ANSWER_FILES      4U
#define ANSWER_EXTENSIONS 5U
#define ANSWER_SERVICES   6U
#define ANSWER_ERROR      7U

typedef enum fv_scope_kind {
    FV_IN_FILE,
    FV_IN_MESSAGE,
    FV_IN_SERVICE,
    FV_IN_ENUM,
    FV_IN_LEAF
} fv_scope_kind_t;

/* Which fields of a descriptor name something below it. */
static const struct {
    fv_scope_kind_t scope;
    uint32_t number;
    fv_scope_kind_t child;
} k_children[] = {
    {FV_IN_FILE, 4, FV_IN_MESSAGE},    {FV_IN_FILE, 5, FV_IN_ENUM},
    {FV_IN_FILE, 6, FV_IN_SERVICE},    {FV_IN_MESSAGE, 2, FV_IN_LEAF},
    {FV_IN_MESSAGE, 3, FV_IN_MESSAGE}, {FV_IN_MESSAGE, 4, FV_IN_ENUM},
    {FV_IN_MESSAGE, 8, FV_IN_LEAF},    {FV_IN_SERVICE, 2, FV_IN_LEAF},
};
#define N_CHILDREN (sizeof(k_children) / sizeof(k_children[0]))

static bool is_equal(fv_span_t a, fv_span_t b)
{
    return (a.n_bytes == b.n_bytes) &&
           ((a.n_bytes == 0U) || (memcmp(a.data, b.data, a.n_bytes) == 0));
}

/* The descriptors are ours, so what they hold is not checked again: malformed reads as absent. */
static fv_span_t bytes_of(fv_span_t message, uint32_t number)
{
    fv_span_t found;

    (void)fv_pb_find_bytes(message, number, &found);
    return found;
}

/* ------------------------------------------------------------------ files */

typedef struct fv_file_iter {
    fv_span_t sets[2];
    size_t set_idx;
} fv_file_iter_t;

static fv_file_iter_t files(void)
{
    return (fv_file_iter_t){{{fv_descriptor_set, fv_descriptor_set_bytes},
                             {fv_rpc_descriptor_set, fv_rpc_descriptor_set_bytes}},
                            0};
}

static bool next_file(fv_file_iter_t *iter, fv_span_t *out)
{
    fv_pb_field_t field;

    while (iter->set_idx < 2U) {
        if (fv_pb_next(&iter->sets[iter->set_idx], &field) != FV_PB_FIELD) {
            iter->set_idx++;
        } else if (field.number == SET_FILE) {
            *out = field.bytes;
            return true;
        }
    }
    return false;
}

/* ------------------------------------------------------------------ symbols */

static bool enum_has_value(fv_span_t descriptor, fv_span_t name)
{
    fv_pb_field_t field;

    while (fv_pb_next(&descriptor, &field) == FV_PB_FIELD) {
        if ((field.number == ENUM_VALUE) && is_equal(bytes_of(field.bytes, ANY_NAME), name)) {
            return true;
        }
    }
    return false;
}

/* Finds `name` directly below `*scope` and steps into it. An enum's values are named beside the enum. */
static bool step_into(fv_span_t *scope, fv_scope_kind_t *kind, fv_span_t name)
{
    fv_pb_field_t field;
    fv_span_t rest = *scope;

    while (fv_pb_next(&rest, &field) == FV_PB_FIELD) {
        for (size_t i = 0; i < N_CHILDREN; i++) {
            if ((k_children[i].scope != *kind) || (k_children[i].number != field.number)) {
                continue;
            }
            fv_scope_kind_t child = k_children[i].child;
            if (is_equal(bytes_of(field.bytes, ANY_NAME), name)) {
                *scope = field.bytes;
                *kind = child;
                return true;
            }
            if ((child == FV_IN_ENUM) && enum_has_value(field.bytes, name)) {
                *kind = FV_IN_LEAF;
                return true;
            }
        }
    }
    return false;
}

/* True when `symbol` ("fovea.v1.AttendRequest.q") is defined in `file`. */
static bool defines(fv_span_t file, fv_span_t symbol)
{
    fv_span_t package = bytes_of(file, FILE_PACKAGE);
    fv_scope_kind_t kind = FV_IN_FILE;

    if (package.n_bytes > 0U) {
        if ((symbol.n_bytes <= package.n_bytes) || (symbol.data[package.n_bytes] != '.') ||
            (memcmp(symbol.data, package.data, package.n_bytes) != 0)) {
            return false;
        }
        symbol.data += package.n_bytes + 1U;
        symbol.n_bytes -= package.n_bytes + 1U;
    }
    while (symbol.n_bytes > 0U) {
        const uint8_t *dot = memchr(symbol.data, '.', symbol.n_bytes);
        size_t n_head = (dot == NULL) ? symbol.n_bytes : (size_t)(dot - symbol.data);
        fv_span_t head = {symbol.data, n_head};
        if (!step_into(&file, &kind, head)) {
            return false;
        }
        if (dot == NULL) {
            return true;
        }
        symbol.data += n_head + 1U;
        symbol.n_bytes -= n_head + 1U;
    }
    return false;
}

/* ------------------------------------------------------------------ answers */

static void put_error(fv_pb_writer_t *out, uint64_t code, const char *text)
{
    fv_pb_writer_t error = {0};

    fv_pb_put_varint(&error, 1, code);
    fv_pb_put_bytes(&error, 2, (fv_span_t){(const uint8_t *)text, strlen(text)});
    fv_pb_put_bytes(out, ANSWER_ERROR, (fv_span_t){error.data, error.n_bytes});
    out->failed = out->failed || error.failed;
    fv_pb_writer_fini(&error);
}

/* The first file that has the name, or defines the symbol. None of our files imports another. */
static void put_file(fv_pb_writer_t *out, fv_span_t wanted, bool is_symbol)
{
    fv_file_iter_t iter = files();
    fv_pb_writer_t list = {0};
    fv_span_t file;
    bool is_found = false;

    while (!is_found && next_file(&iter, &file)) {
        is_found = is_symbol ? defines(file, wanted) : is_equal(bytes_of(file, FILE_NAME), wanted);
    }
    if (!is_found) {
        put_error(out, GRPC_NOT_FOUND,
                  is_symbol ? "symbol: not defined here" : "file: not known here");
        return;
    }
    fv_pb_put_bytes(&list, 1, file);
    fv_pb_put_bytes(out, ANSWER_FILES, (fv_span_t){list.data, list.n_bytes});
    out->failed = out->failed || list.failed;
    fv_pb_writer_fini(&list);
}

/* proto3 has no extensions: a known type has none. */
static void put_extensions(fv_pb_writer_t *out, fv_span_t type)
{
    fv_file_iter_t iter = files();
    fv_pb_writer_t answer = {0};
    fv_span_t file;
    bool is_found = false;

    while (!is_found && next_file(&iter, &file)) {
        is_found = defines(file, type);
    }
    if (!is_found) {
        put_error(out, GRPC_NOT_FOUND, "type: not defined here");
        return;
    }
    fv_pb_put_bytes(&answer, 1, type);
    fv_pb_put_bytes(out, ANSWER_EXTENSIONS, (fv_span_t){answer.data, answer.n_bytes});
    out->failed = out->failed || answer.failed;
    fv_pb_writer_fini(&answer);
}

/* ListServiceResponse { repeated ServiceResponse { string name = 1; } service = 1; } */
static void put_service(fv_pb_writer_t *list, fv_span_t package, fv_span_t name)
{
    uint8_t full[256];
    fv_pb_writer_t service = {0};
    size_t n = package.n_bytes;

    if (n + name.n_bytes + 1U > sizeof(full)) {
        return; /* no name of ours is that long */
    }
    memcpy(full, package.data, n);
    full[n++] = '.';
    memcpy(full + n, name.data, name.n_bytes);
    fv_pb_put_bytes(&service, 1, (fv_span_t){full, n + name.n_bytes});
    fv_pb_put_bytes(list, 1, (fv_span_t){service.data, service.n_bytes});
    list->failed = list->failed || service.failed;
    fv_pb_writer_fini(&service);
}

static void put_services(fv_pb_writer_t *out)
{
    fv_file_iter_t iter = files();
    fv_pb_writer_t list = {0};
    fv_pb_field_t field;
    fv_span_t file;

    while (next_file(&iter, &file)) {
        fv_span_t package = bytes_of(file, FILE_PACKAGE);
        for (fv_span_t rest = file; fv_pb_next(&rest, &field) == FV_PB_FIELD;) {
            if (field.number == FILE_SERVICE) {
                put_service(&list, package, bytes_of(field.bytes, ANY_NAME));
            }
        }
    }
    fv_pb_put_bytes(out, ANSWER_SERVICES, (fv_span_t){list.data, list.n_bytes});
    out->failed = out->failed || list.failed;
    fv_pb_writer_fini(&list);
}

/* The last of the alternatives wins, as protobuf has it. */
static bool read_request(fv_span_t request, fv_pb_field_t *out)
{
    fv_pb_field_t field;
    fv_pb_result_t result = FV_PB_END;

    memset(out, 0, sizeof(*out));
    while ((result = fv_pb_next(&request, &field)) == FV_PB_FIELD) {
        if ((field.number >= ASK_FILE) && (field.number <= ASK_SERVICES)) {
            *out = field;
        }
    }
    return result == FV_PB_END;
}

void fv_reflection_message(fv_call_t *call, fv_span_t request)
{
    fv_pb_writer_t out = {0};
    fv_pb_field_t ask;

    if (!read_request(request, &ask)) {
        fv_call_fail(call, GRPC_INVALID_ARGUMENT, "request: not a ServerReflectionRequest");
        return;
    }
    fv_pb_put_bytes(&out, ANSWER_REQUEST, request);
    switch (ask.number) {
    case ASK_FILE:
    case ASK_SYMBOL:
        put_file(&out, ask.bytes, ask.number == ASK_SYMBOL);
        break;
    case ASK_EXTENSION:
        put_error(&out, GRPC_NOT_FOUND, "extension: there are none here");
        break;
    case ASK_EXTENSIONS:
        put_extensions(&out, ask.bytes);
        break;
    case ASK_SERVICES:
        put_services(&out);
        break;
    default:
        put_error(&out, GRPC_INVALID_ARGUMENT, "request: asks for nothing");
        break;
    }
    if (out.failed) {
        fv_pb_writer_fini(&out);
        fv_call_fail(call, GRPC_RESOURCE_EXHAUSTED, "reflection: out of host memory");
        return;
    }
    fv_reply_piece_t piece = {
        .data = out.data, .n_bytes = out.n_bytes, .release = free, .arg = out.data};
    fv_call_reply(call, &piece, 1);
}
