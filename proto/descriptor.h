/*
 * descriptor.h - the compiled form of attention.proto, as server reflection serves it.
 *
 * A serialized google.protobuf.FileDescriptorSet (one file, fovea.v1), written by protoc at build time.
 */
#ifndef FV_PROTO_DESCRIPTOR_H
#define FV_PROTO_DESCRIPTOR_H

#include <stddef.h>
#include <stdint.h>

extern const uint8_t fv_descriptor_set[];
extern const size_t fv_descriptor_set_bytes;

#endif /* FV_PROTO_DESCRIPTOR_H */
