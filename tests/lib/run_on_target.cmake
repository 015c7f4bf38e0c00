# Runs the comparisons with the reference on one instruction set; a machine that lacks it says so and has nothing to compare.
set(ENV{MOBA_CPU_TARGET} ${INSTRUCTIONS})
execute_process(COMMAND ${TESTS} --gtest_brief=1 --gtest_filter=BackendChoice.DefaultIsTheFastOne:CpuTarget.*
                RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(output MATCHES "expected MOBA_CPU_TARGET")
  message(STATUS "this machine has no ${INSTRUCTIONS}")
  return()
endif()
# A million rows take their time without vectors.
if(INSTRUCTIONS MATCHES "AVX")
  set(gates ":CpuGate.*")
endif()
execute_process(COMMAND ${TESTS} --gtest_brief=1 "--gtest_filter=CpuTarget.*:All/FastAgreement.*cpu_0:*/cpu${gates}"
                RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "the library's tests fail on ${INSTRUCTIONS}")
endif()
