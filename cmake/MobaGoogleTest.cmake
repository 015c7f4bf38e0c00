# The test framework, as GTest::gtest_main and GTest::gmock: the system's, else fetched at a pinned commit.
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  message(STATUS "GoogleTest is not installed (Debian: libgtest-dev libgmock-dev): fetching version 1.15.2. "
                 "Without a network, FETCHCONTENT_SOURCE_DIR_GOOGLETEST names an unpacked source; MOBA_BUILD_TESTS=OFF needs none.")
  include(FetchContent)
  set(INSTALL_GTEST OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(googletest GIT_REPOSITORY https://github.com/google/googletest.git
                                  GIT_TAG b514bdc898e2951020cbdca1304b75f5950d1f59)  # 1.15.2
  FetchContent_MakeAvailable(googletest)
endif()
