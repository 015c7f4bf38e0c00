#include "llm/formats/write_safetensors.h"

#include <nlohmann/json.hpp>

#include "llm/formats/output_file.h"

namespace moba::llm {

void write_safetensors(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors) {
  nlohmann::ordered_json header;
  header["__metadata__"]["format"] = "pt";  // required by transformers
  std::size_t end = 0;
  for (const NamedTensor& tensor : tensors) {
    const std::size_t begin = end;
    end += tensor.values.size_bytes();
    header[tensor.name] = {{"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // data are aligned to 8 bytes
  const std::uint64_t length = text.size();

  OutputFile file(path);
  file.write(&length, sizeof length);
  file.write(text);
  for (const NamedTensor& tensor : tensors) file.write(tensor.values.data(), tensor.values.size_bytes());
  file.finish();
}

}  // namespace moba::llm
