fv_add_library(fv_plan HEADERS plan.h plan_grid.h plan_order.h plan_text.h plan_prefill.h
               SOURCES plan.c plan_grid.c plan_shape.c plan_order.c plan_text.c plan_prefill.c LIBS fv_proto)
