// tokenizer.json: the reader.
#include "llm/error.h"
#include "llm/tokenizer/tokenizer_data.h"
#include "tests/fuzz/file_of.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const moba::fuzz::File file(data, size);
  try {
    moba::llm::read_tokenizer_json(file.path());
  } catch (const moba::llm::DataError&) {
  }
  return 0;
}
