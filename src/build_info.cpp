#include "moba/build_info.h"

#include <string_view>

namespace moba {
namespace {

std::vector<std::string> split(std::string_view list) {
  std::vector<std::string> parts;
  while (!list.empty()) {
    const std::size_t comma = list.find(',');
    parts.emplace_back(list.substr(0, comma));
    list.remove_prefix(comma == std::string_view::npos ? list.size() : comma + 1);
  }
  return parts;
}

}  // namespace

BuildInfo build_info() {
  return {.version = MOBA_VERSION,
          .type = MOBA_BUILD_TYPE,
          .compiler = MOBA_COMPILER,
          .cuda_architectures = split(MOBA_CUDA_ARCHITECTURES)};
}

}  // namespace moba
