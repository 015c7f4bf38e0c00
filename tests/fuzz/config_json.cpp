// JSON: the parser, and the configuration of a model.
#include <string_view>

#include "llm/error.h"
#include "llm/formats/json.h"
#include "llm/formats/read_config.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto document = moba::llm::parse_json({reinterpret_cast<const char*>(data), size}, "config.json");
    moba::llm::read_config(moba::llm::JsonValue(document, "config.json"));
  } catch (const moba::llm::DataError&) {
  }
  return 0;
}
