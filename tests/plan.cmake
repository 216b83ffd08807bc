fv_add_test(test_plan unit SOURCES unit/test_plan.c LIBS fv_plan m)
fv_add_test(test_plan_prefill unit SOURCES unit/test_plan_prefill.c LIBS fv_plan m)
fv_add_test(prop_plan property SOURCES property/prop_plan.c LIBS fv_plan TIMEOUT 60)
fv_add_test(prop_plan_s2 property SOURCES property/prop_plan_s2.c LIBS fv_plan m TIMEOUT 60)
