# moba_fetch(name url commit packages) builds a missing dependency from its source at a pinned commit. If the repository
# cannot be reached, the error names the packages to install instead of showing Git's messages.
# FETCHCONTENT_SOURCE_DIR_<NAME> names an unpacked source, which needs no network.
include(FetchContent)

macro(moba_fetch name url commit packages)
  string(TOUPPER FETCHCONTENT_SOURCE_DIR_${name} MOBA_FETCH_SOURCE)
  if(NOT ${MOBA_FETCH_SOURCE} AND NOT EXISTS ${FETCHCONTENT_BASE_DIR}/${name}-src/CMakeLists.txt)
    message(STATUS "${name} is not installed: fetching ${url}")
    find_package(Git QUIET)
    if(GIT_FOUND)
      execute_process(COMMAND ${CMAKE_COMMAND} -E env GIT_TERMINAL_PROMPT=0 ${GIT_EXECUTABLE} ls-remote ${url} HEAD
                      TIMEOUT 60 OUTPUT_QUIET ERROR_QUIET RESULT_VARIABLE MOBA_FETCH_RESULT)
    endif()
    if(NOT GIT_FOUND OR NOT MOBA_FETCH_RESULT EQUAL 0)
      message(FATAL_ERROR "${name}: expected ${packages} to be installed, or ${url} to be reached with Git, got neither. "
                          "Without a network, ${MOBA_FETCH_SOURCE} names an unpacked source.")
    endif()
  endif()
  # SYSTEM comes first: CMake 3.25 parses one after the tag as a part of it.
  FetchContent_Declare(${name} SYSTEM GIT_REPOSITORY ${url} GIT_TAG ${commit})
  FetchContent_MakeAvailable(${name})
endmacro()
