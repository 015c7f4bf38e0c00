// Any bytes as the input of a byte-level tokenizer: ids are in the vocabulary, and decoding gives the bytes
// back.
#include <cstdlib>
#include <string_view>

#include "llm/tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const auto tokenizer = moba::llm::Tokenizer::open(MOBA_FUZZ_TOKENIZER);
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const bool parse_special : {false, true}) {
    const auto ids = tokenizer.encode(text, false, parse_special);
    for (const std::int32_t id : ids) {
      if (id < 0 || id >= tokenizer.vocab_size()) std::abort();
    }
    if (tokenizer.decode(ids, true) != text) std::abort();
  }
  return 0;
}
