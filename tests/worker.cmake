# Tests of worker/.
fv_add_test(test_kv_pool unit SOURCES unit/test_kv_pool.c LIBS fv_worker)
