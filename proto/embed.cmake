# cmake -DINPUT=a.pb -DOUTPUT=a.c -P embed.cmake
# Writes the bytes of INPUT as the C arrays of proto/descriptor.h.
file(READ "${INPUT}" _hex HEX)
string(REGEX REPLACE "(..)" "0x\\1, " _bytes "${_hex}")
string(REGEX REPLACE "((0x.., ){16})" "\\1\n    " _bytes "${_bytes}")
file(WRITE "${OUTPUT}" "/* Generated from attention.proto; do not edit. */
#include \"proto/descriptor.h\"

const uint8_t fv_descriptor_set[] = {
    ${_bytes}
};
const size_t fv_descriptor_set_bytes = sizeof(fv_descriptor_set);
")
