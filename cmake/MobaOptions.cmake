# The compile options of our own code, as one interface target.
add_library(moba_options INTERFACE)
target_compile_options(moba_options INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion
                                              -fno-math-errno)
if(MOBA_WARNINGS_AS_ERRORS)
  target_compile_options(moba_options INTERFACE -Werror)
endif()
if(MOBA_SANITIZE)
  target_compile_options(moba_options INTERFACE -fsanitize=${MOBA_SANITIZE} -fno-sanitize-recover=all
                                                -fno-omit-frame-pointer)
  target_link_options(moba_options INTERFACE -fsanitize=${MOBA_SANITIZE})
endif()
