# Provides the test framework as GTest::gtest_main and GTest::gmock: the system's, else version 1.15.2.
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  set(INSTALL_GTEST OFF CACHE BOOL "" FORCE)
  include(MobaFetch)
  moba_fetch(googletest https://github.com/google/googletest.git b514bdc898e2951020cbdca1304b75f5950d1f59
             "Debian's libgtest-dev and libgmock-dev (or MOBA_BUILD_TESTS=OFF)")
endif()
