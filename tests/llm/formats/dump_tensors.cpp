// Writes every tensor of one weights file as f32, in the file's order, to standard output; with --list, their
// names, types and shapes. The tests compare them with PyPI's gguf and safetensors. With --open, opens a
// whole model, as the program does first.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <string_view>
#include <vector>

#include "llm/error.h"
#include "llm/formats/dequantise.h"
#include "llm/formats/gguf.h"
#include "llm/formats/safetensors.h"
#include "llm/formats/weights.h"

namespace {

using moba::llm::GgufFile;
using moba::llm::SafetensorsFile;
using moba::llm::StoredTensor;

void list(const std::vector<StoredTensor>& tensors) {
  for (const StoredTensor& tensor : tensors) {
    fmt::print("{} {} {}\n", tensor.name, name_of(tensor.storage), fmt::join(tensor.shape, "x"));
  }
}

/// Reads three rows at a time, so that reads begin in the middle of a tensor as well.
void dump(const std::vector<StoredTensor>& tensors) {
  constexpr std::int64_t kRows = 3;
  for (const StoredTensor& tensor : tensors) {
    const std::int64_t length = tensor.row_length(), rows = length == 0 ? 0 : tensor.count() / length;
    std::vector<float> values(static_cast<std::size_t>(kRows * length));
    for (std::int64_t row = 0; row < rows; row += kRows) {
      const std::int64_t count = std::min(kRows, rows - row);
      dequantise(tensor, row, count, values.data());
      std::fwrite(values.data(), sizeof(float), static_cast<std::size_t>(count * length), stdout);
    }
  }
}

void run(const std::filesystem::path& path, std::string_view flag) {
  if (flag == "--open") {
    moba::llm::Weights::open(path);
    return;
  }
  const auto show = flag == "--list" ? list : dump;
  if (GgufFile::is_gguf(path)) {
    show(GgufFile::open(path).tensors());
  } else {
    show(SafetensorsFile::open(path).tensors);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view flag = argc == 3 ? argv[2] : "";
  if (argc < 2 || argc > 3 || (argc == 3 && flag != "--list" && flag != "--open")) {
    std::fputs("usage: dump_tensors FILE [--list|--open]\n", stderr);
    return 2;
  }
  try {
    run(argv[1], flag);
    return 0;
  } catch (const moba::llm::DataError& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
