# Installs headers, the library and its CMake package, for find_package(moba).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(MOBA_PACKAGE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/moba)
install(TARGETS moba EXPORT moba-targets)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/moba TYPE INCLUDE FILES_MATCHING PATTERN "*.h")
install(EXPORT moba-targets NAMESPACE moba:: DESTINATION ${MOBA_PACKAGE_DIR})
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE TYPE DOC)

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/moba-config.cmake.in ${PROJECT_BINARY_DIR}/moba-config.cmake
                              INSTALL_DESTINATION ${MOBA_PACKAGE_DIR} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/moba-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/moba-config.cmake ${PROJECT_BINARY_DIR}/moba-config-version.cmake
        DESTINATION ${MOBA_PACKAGE_DIR})
