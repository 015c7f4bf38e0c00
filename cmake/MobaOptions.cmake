# Defines the compile options of this project's code as an interface target.
add_library(moba_options INTERFACE)
target_compile_options(
  moba_options INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-Wno-sign-conversion;-fno-math-errno>")
if(MOBA_WARNINGS_AS_ERRORS)
  target_compile_options(moba_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(MOBA_SANITIZE)
  # -O1 -g1: with sanitizers the kernels take twice as long to compile at -O2; reports need line numbers only.
  target_compile_options(moba_options INTERFACE -fsanitize=${MOBA_SANITIZE} -fno-sanitize-recover=all
                                                -fno-omit-frame-pointer -O1 -g1)
  target_link_options(moba_options INTERFACE -fsanitize=${MOBA_SANITIZE})
endif()
