# The vector library, as hwy::hwy: the system's, else fetched at a pinned commit.
find_package(hwy QUIET)
if(NOT hwy_FOUND)
  message(STATUS "Highway is not installed (Debian: libhwy-dev, Homebrew: highway; or set hwy_DIR): fetching version 1.2.0. "
                 "Without a network, FETCHCONTENT_SOURCE_DIR_HIGHWAY names an unpacked source.")
  include(FetchContent)
  set(HWY_ENABLE_TESTS OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_EXAMPLES OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_CONTRIB OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_INSTALL ON CACHE BOOL "" FORCE)  # the package of moba asks for that of hwy
  set(HWY_FORCE_STATIC_LIBS ON CACHE BOOL "" FORCE)
  FetchContent_Declare(highway GIT_REPOSITORY https://github.com/google/highway.git
                               GIT_TAG 457c891775a7397bdb0376bb1031e6e027af1c48)  # 1.2.0
  FetchContent_MakeAvailable(highway)
  add_library(hwy::hwy ALIAS hwy)
endif()
