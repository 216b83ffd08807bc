# proto/ and common/config: wire codec, placement arithmetic, options; fuzz targets.
fv_add_test(prop_wire_attend property SOURCES property/prop_wire_attend.c fuzz/wire_oracle.c
            LIBS fv_proto fv_proto_gen)
fv_add_test(test_config unit SOURCES unit/test_config.c LIBS fv_common)
fv_add_test(test_step unit SOURCES unit/test_step.c LIBS fv_proto)
fv_add_test(test_model unit SOURCES unit/test_model.c LIBS fv_common)
fv_add_test(test_wire_attend unit SOURCES unit/test_wire_attend.c LIBS fv_proto)
fv_add_test(prop_wire_control property SOURCES property/prop_wire_control.c LIBS fv_proto)
fv_add_test(test_wire_control unit SOURCES unit/test_wire_control.c LIBS fv_proto fv_proto_gen)
