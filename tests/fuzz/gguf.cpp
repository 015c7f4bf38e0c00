// GGUF: headers, metadata, the configuration, the tensors' places, and the tokenizer in the metadata.
#include "llm/formats/gguf.h"
#include "llm/error.h"
#include "llm/formats/weights.h"
#include "llm/tokenizer/tokenizer.h"
#include "tests/fuzz/file_of.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const moba::fuzz::File file(data, size);
  try {
    const auto weights = moba::llm::Weights::open(file.path());
    for (const auto& tensor : weights.tensors()) {
      if (!tensor.bytes.empty() && tensor.bytes.back() == std::byte{255}) weights.find(tensor.name);
    }
  } catch (const moba::llm::DataError&) {
  }
  try {
    if (!moba::llm::GgufFile::is_gguf(file.path())) return 0;
    const auto tokenizer = moba::llm::Tokenizer::open(file.path());
    tokenizer.decode(tokenizer.encode("Two words\n", true, true));
  } catch (const moba::llm::DataError&) {
  }
  return 0;
}
