# Installs headers, the libraries, their CMake package, for find_package(moba), and their pkg-config file.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(MOBA_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/moba)
install(TARGETS moba EXPORT moba-targets)
install(EXPORT moba-targets NAMESPACE moba:: DESTINATION ${MOBA_PACKAGE_DIR})
if(TARGET moba_shared)
  install(TARGETS moba_shared EXPORT moba-shared-targets)
  install(EXPORT moba-shared-targets NAMESPACE moba:: DESTINATION ${MOBA_PACKAGE_DIR})
endif()
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/moba TYPE INCLUDE FILES_MATCHING PATTERN "*.h")
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE TYPE DOC)

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/moba-config.cmake.in ${PROJECT_BINARY_DIR}/moba-config.cmake
                              INSTALL_DESTINATION ${MOBA_PACKAGE_DIR} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/moba-config-version.cmake COMPATIBILITY SameMajorVersion)
install(FILES ${PROJECT_BINARY_DIR}/moba-config.cmake ${PROJECT_BINARY_DIR}/moba-config-version.cmake
        DESTINATION ${MOBA_PACKAGE_DIR})

# The prefix is found from the file's own place, so that an installed tree can be moved.
file(RELATIVE_PATH MOBA_PREFIX_FROM_PKGCONFIG /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
list(TRANSFORM OpenMP_CXX_LIB_NAMES PREPEND -l OUTPUT_VARIABLE MOBA_OPENMP_LIBRARIES)
list(JOIN MOBA_OPENMP_LIBRARIES " " MOBA_OPENMP_LIBRARIES)
configure_file(${CMAKE_CURRENT_LIST_DIR}/moba.pc.in ${PROJECT_BINARY_DIR}/moba.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/moba.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
