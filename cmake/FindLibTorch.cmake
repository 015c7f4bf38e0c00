# Finds LibTorch in the PyTorch wheel; defines the imported target LibTorch::LibTorch. Torch's own CMake package is not
# used: with a CUDA wheel it requires a CUDA toolkit, and it adds a second to every configure. Searches MOBA_TORCH_DIR (a
# folder with include/ and lib/), else the wheel of the Python that builds a package (pip), of .venv's, of python3.
if(NOT MOBA_TORCH_DIR)
  if(SKBUILD AND Python3_EXECUTABLE)
    set(MOBA_TORCH_PYTHON ${Python3_EXECUTABLE})
  endif()
  find_program(MOBA_TORCH_PYTHON NAMES python3 PATHS ${PROJECT_SOURCE_DIR}/.venv/bin NO_DEFAULT_PATH)
  find_program(MOBA_TORCH_PYTHON NAMES python3)
  execute_process(
    COMMAND ${MOBA_TORCH_PYTHON} -c
            "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE MOBA_TORCH_FOUND OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(MOBA_TORCH_DIR "${MOBA_TORCH_FOUND}" CACHE PATH "The torch folder of a wheel, or an unpacked LibTorch" FORCE)
endif()

find_path(LibTorch_INCLUDE_DIR ATen/ATen.h PATHS ${MOBA_TORCH_DIR}/include NO_DEFAULT_PATH)
find_library(LibTorch_CPU torch_cpu PATHS ${MOBA_TORCH_DIR}/lib NO_DEFAULT_PATH)
find_library(LibTorch_C10 c10 PATHS ${MOBA_TORCH_DIR}/lib NO_DEFAULT_PATH)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch REQUIRED_VARS LibTorch_CPU LibTorch_C10 LibTorch_INCLUDE_DIR
                                  REASON_FAILURE_MESSAGE "pip install torch, or set MOBA_TORCH_DIR")

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  target_include_directories(LibTorch::LibTorch SYSTEM INTERFACE
                             ${LibTorch_INCLUDE_DIR} ${LibTorch_INCLUDE_DIR}/torch/csrc/api/include)
  target_link_libraries(LibTorch::LibTorch INTERFACE ${LibTorch_CPU} ${LibTorch_C10})
  # The run path is set here: CMake's own would cause a warning, because the wheel's libgomp precedes the compiler's. That
  # order is intended, so that a process has one OpenMP runtime.
  get_filename_component(LibTorch_LIB_DIR ${LibTorch_CPU} DIRECTORY)
  target_link_options(LibTorch::LibTorch INTERFACE "LINKER:-rpath,${LibTorch_LIB_DIR}")
  set(CMAKE_SKIP_BUILD_RPATH ON)
  target_compile_definitions(LibTorch::LibTorch INTERFACE _GLIBCXX_USE_CXX11_ABI=1)
endif()
