add_test(NAME test_launcher COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/deploy/test_launcher.sh)
set_tests_properties(test_launcher PROPERTIES LABELS deploy TIMEOUT 180 SKIP_RETURN_CODE 77)
add_test(NAME test_cuda_archs COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/deploy/test_cuda_archs.sh ${CMAKE_COMMAND})
set_tests_properties(test_cuda_archs PROPERTIES LABELS deploy TIMEOUT 30)
