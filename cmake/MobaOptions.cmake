# The compile options of our own code, as one interface target.
add_library(moba_options INTERFACE)
target_compile_options(
  moba_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-Wno-sign-conversion;-fno-math-errno>")
if(MOBA_WARNINGS_AS_ERRORS)
  target_compile_options(moba_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(MOBA_SANITIZE)
  # -O1 -g1: the kernels' checks take twice as long to compile at -O2; lines are all that a report needs.
  target_compile_options(moba_options INTERFACE -fsanitize=${MOBA_SANITIZE} -fno-sanitize-recover=all
                                                -fno-omit-frame-pointer -O1 -g1)
  target_link_options(moba_options INTERFACE -fsanitize=${MOBA_SANITIZE})
endif()
