#include "llm/error.h"
#include "llm/tokenizer/tokenizer_data.h"
namespace moba::llm {
TokenizerData read_tokenizer_gguf(const std::filesystem::path& f) {
  throw DataError(f.string() + ": gguf later");
}
}  // namespace moba::llm
