# Provides the vector library as hwy::hwy: the system's, else version 1.2.0.
find_package(hwy QUIET)
if(NOT hwy_FOUND)
  set(HWY_ENABLE_TESTS OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_EXAMPLES OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_CONTRIB OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_INSTALL ON CACHE BOOL "" FORCE)  # moba's package depends on that of hwy
  set(HWY_FORCE_STATIC_LIBS ON CACHE BOOL "" FORCE)
  include(MobaFetch)
  moba_fetch(highway https://github.com/google/highway.git 457c891775a7397bdb0376bb1031e6e027af1c48
             "Debian's libhwy-dev or Homebrew's highway")
  add_library(hwy::hwy ALIAS hwy)
endif()
