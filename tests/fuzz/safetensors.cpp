// safetensors: the header and the tensors' places.
#include "llm/formats/safetensors.h"

#include "llm/error.h"
#include "tests/fuzz/file_of.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const moba::fuzz::File file(data, size);
  try {
    volatile std::uint8_t last = 0;
    for (const auto& tensor : moba::llm::SafetensorsFile::open(file.path()).tensors) {
      if (!tensor.bytes.empty()) last = static_cast<std::uint8_t>(tensor.bytes.front() ^ tensor.bytes.back());
    }
    static_cast<void>(last);
  } catch (const moba::llm::DataError&) {
  }
  return 0;
}
