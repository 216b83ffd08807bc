# cmake -DINPUT=a.pb -DOUTPUT=a.c -P rpc_embed.cmake
# Writes the bytes of INPUT as fv_rpc_descriptor_set of coord/rpc_internal.h.
file(READ "${INPUT}" _hex HEX)
string(REGEX REPLACE "(..)" "0x\\1, " _bytes "${_hex}")
string(REGEX REPLACE "((0x.., ){16})" "\\1\n    " _bytes "${_bytes}")
file(WRITE "${OUTPUT}" "/* Generated from the .proto files of health and reflection; do not edit. */
#include \"coord/rpc_internal.h\"

const uint8_t fv_rpc_descriptor_set[] = {
    ${_bytes}
};
const size_t fv_rpc_descriptor_set_bytes = sizeof(fv_rpc_descriptor_set);
")
