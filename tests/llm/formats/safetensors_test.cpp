#include "llm/formats/safetensors.h"

#include "build_files.h"
#include "llm/formats/dequantise.h"

namespace moba::llm {
namespace {

using Safetensors = WithFolder;

std::string safetensors_text(const std::string& header, std::size_t data_bytes) {
  return bytes_of(static_cast<std::uint64_t>(header.size())) + header + std::string(data_bytes, '\x01');
}

TEST_F(Safetensors, ListsTensorsInFileOrder) {
  const std::string header = R"({"__metadata__": {"format": "pt"},)"
                             R"("a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [4, 16]},)"
                             R"("scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},)"
                             R"("empty": {"dtype": "BF16", "shape": [4, 0], "data_offsets": [16, 16]}})";
  const auto tensors = SafetensorsFile::open(write("m.safetensors", safetensors_text(header, 16))).tensors;
  ASSERT_EQ(tensors.size(), 3U);
  EXPECT_EQ(tensors[0].name, "scalar");
  EXPECT_EQ(tensors[0].row_length(), 1);
  EXPECT_EQ(tensors[1].name, "a");
  EXPECT_EQ(tensors[1].shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(tensors[1].storage, Storage::f16);
  EXPECT_EQ(tensors[1].bytes.data() - tensors[0].bytes.data(), 4);
  EXPECT_EQ(tensors[2].count(), 0);
}

TEST_F(Safetensors, DamagedFilesLoadOrThrow) {
  const std::string good = safetensors_text(
      R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}})",
      12);
  expect_survival(good, [&](const std::string& bytes) {
    const SafetensorsFile file = SafetensorsFile::open(write("bad.safetensors", bytes));
    std::vector<float> values;
    for (const StoredTensor& tensor : file.tensors) {
      values.resize(static_cast<std::size_t>(tensor.count()));
      if (tensor.count() != 0) dequantise(tensor, 0, tensor.count() / tensor.row_length(), values.data());
    }
  });
}

TEST_F(Safetensors, InvalidHeadersThrow) {
  const auto complaint = [&](const std::string& entries, std::size_t data) {
    const auto path = write("m.safetensors", safetensors_text(entries, data));
    const std::string text = complaint_of([&] { SafetensorsFile::open(path); });
    return text.substr(std::min(text.size(), path.string().size()));
  };
  EXPECT_EQ(complaint(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4),
            ": a.data_offsets: expected 8 bytes for F32 [2], got 4");
  EXPECT_EQ(complaint(R"({"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}})", 2),
            ": a.dtype: expected F32, F16 or BF16, got 'F8_E4M3'");
  EXPECT_EQ(complaint(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4),
            ": a.shape[0]: expected 0 or more, got -1");
  EXPECT_EQ(complaint(R"({"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]},)"
                      R"("b":{"dtype":"F16","shape":[4],"data_offsets":[4,12]}})",
                      12),
            ": expected tensor 'b' at byte 8 of the data, got it at 4, overlapping another");
  EXPECT_EQ(complaint(R"({"a":{"dtype":"F16","shape":[4],"data_offsets":[2,10]}})", 10),
            ": expected tensor 'a' at byte 0 of the data, got it at 2, after a gap");
  EXPECT_EQ(complaint(R"({"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}})", 3),
            ": expected 2 bytes of data, all that the header names, got 3");
  EXPECT_EQ(complaint(R"({"a":{"dtype":"F16","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0),
            ": a.shape: expected a size of 63 bits, got F16 [4611686018427387904, 4]");
}

}  // namespace
}  // namespace moba::llm
