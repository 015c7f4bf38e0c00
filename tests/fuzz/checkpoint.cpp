// The optimiser's file of a checkpoint, read into the layout of a small model.
#include <vector>

#include "llm/error.h"
#include "llm/train/checkpoint.h"
#include "tests/fuzz/file_of.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const auto layout = [] {
    moba::llm::train::Layout two;
    two.add("weight", {4, 2});
    two.add("norm", {4});
    return two;
  }();
  const moba::fuzz::File file(data, size);
  std::vector<float> first(static_cast<std::size_t>(layout.size())), second(first);
  try {
    moba::llm::train::read_sections(file.path(), {{"adam.m", &layout, first}, {"adam.v", &layout, second}});
  } catch (const moba::llm::DataError&) {
  }
  return 0;
}
