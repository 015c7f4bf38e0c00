#include <limits>

#include "build_files.h"
#include "llm/formats/dequantise.h"

namespace moba::llm {
namespace {

using Gguf = WithFolder;

std::string entries_of_every_type() {
  return GgufText()
      .entry("u8", GgufType::u8, bytes_of(std::uint8_t{200}))
      .entry("i8", GgufType::i8, bytes_of(std::int8_t{-7}))
      .entry("u16", GgufType::u16, bytes_of(std::uint16_t{60000}))
      .entry("i16", GgufType::i16, bytes_of(std::int16_t{-700}))
      .u32("u32", 4000000000U)
      .entry("i32", GgufType::i32, bytes_of(std::int32_t{-70000}))
      .f32("f32", 0.5F)
      .entry("bool", GgufType::boolean, bytes_of(std::uint8_t{1}))
      .text("string", "Gr\xC3\xBC\xC3\x9F\x65")
      .entry("u64", GgufType::u64, bytes_of(std::uint64_t{1} << 40))
      .entry("huge", GgufType::u64, bytes_of(std::numeric_limits<std::uint64_t>::max()))
      .entry("i64", GgufType::i64, bytes_of(std::int64_t{-1} << 40))
      .entry("f64", GgufType::f64, bytes_of(0.25))
      .array("strings", GgufType::string, 3, gguf_string("a") + gguf_string("") + gguf_string("ccc"))
      .array("floats", GgufType::f32, 2, bytes_of(1.5F) + bytes_of(-2.5F))
      .array("integers", GgufType::i16, 2, bytes_of(std::int16_t{-1}) + bytes_of(std::int16_t{2}))
      .array("empty", GgufType::string, 0, "")
      .str();
}

TEST_F(Gguf, ReadsMetadataOfEveryType) {
  const GgufFile file = GgufFile::open(write("all.gguf", entries_of_every_type()));
  EXPECT_EQ(file.version(), 3U);
  EXPECT_EQ(file.at("u8").integer(), 200);
  EXPECT_EQ(file.at("i8").integer(), -7);
  EXPECT_EQ(file.at("u16").integer(), 60000);
  EXPECT_EQ(file.at("i16").integer(), -700);
  EXPECT_EQ(file.at("u32").integer(), 4000000000);
  EXPECT_EQ(file.at("i32").integer(), -70000);
  EXPECT_EQ(file.at("f32").number(), 0.5);
  EXPECT_TRUE(file.at("bool").boolean());
  EXPECT_EQ(file.at("string").string(), "Gr\xC3\xBC\xC3\x9F\x65");
  EXPECT_EQ(file.at("u64").integer(), std::int64_t{1} << 40);
  EXPECT_EQ(file.at("i64").integer(), std::int64_t{-1} << 40);
  EXPECT_EQ(file.at("i64").number(), static_cast<double>(std::int64_t{-1} << 40));
  EXPECT_EQ(file.at("f64").number(), 0.25);
  EXPECT_EQ(file.at("strings").strings(), (std::vector<std::string_view>{"a", "", "ccc"}));
  EXPECT_EQ(file.at("floats").numbers(), (std::vector<float>{1.5F, -2.5F}));
  EXPECT_EQ(file.at("integers").integers(), (std::vector<std::int64_t>{-1, 2}));
  EXPECT_EQ(file.at("integers").numbers(), (std::vector<float>{-1, 2}));
  EXPECT_EQ(file.at("strings").count(), 3U);
  EXPECT_TRUE(file.at("empty").strings().empty());
  EXPECT_FALSE(file.find("nothing"));
}

TEST_F(Gguf, WrongMetadataTypeThrows) {
  const auto path = write("all.gguf", entries_of_every_type());
  const GgufFile file = GgufFile::open(path);
  EXPECT_EQ(complaint_of([&] { file.at("f32").integer(); }),
            path.string() + ": metadata 'f32': expected an integer, got f32");
  EXPECT_EQ(complaint_of([&] { file.at("strings").string(); }),
            path.string() + ": metadata 'strings': expected a string, got an array of 3 string");
  EXPECT_EQ(
      complaint_of([&] { file.at("huge").integer(); }),
      path.string() + ": metadata 'huge': expected an integer up to 2^63 - 1, got 18446744073709551615");
  EXPECT_EQ(complaint_of([&] { file.at("nothing"); }),
            path.string() + ": expected metadata 'nothing', got none");
  EXPECT_NE(complaint_of([&] { file.at("u8").boolean(); }), "");
  EXPECT_NE(complaint_of([&] { file.at("bool").number(); }), "");
  EXPECT_NE(complaint_of([&] { file.at("floats").integers(); }), "");
  EXPECT_NE(complaint_of([&] { file.at("u8").numbers(); }), "");
  EXPECT_NE(complaint_of([&] { file.at("integers").strings(); }), "");
}

TEST_F(Gguf, ShapesHaveTheOutermostDimensionFirst) {
  for (const std::uint32_t version : {2U, 3U}) {
    const GgufFile file =
        GgufFile::open(write("t.gguf", GgufText().tensor("a", {3, 5}).tensor("b", {7}).str(version)));
    EXPECT_EQ(file.version(), version);
    ASSERT_EQ(file.tensors().size(), 2U);
    const StoredTensor &a = file.tensors()[0], &b = file.tensors()[1];
    EXPECT_EQ(a.name, "a");
    EXPECT_EQ(a.shape, (std::vector<std::int64_t>{3, 5}));
    EXPECT_EQ(a.bytes.size(), 60U);
    EXPECT_EQ(b.bytes.data() - a.bytes.data(), 64);
    EXPECT_EQ(b.bytes.size(), 28U);
  }
}

TEST_F(Gguf, CopiesKeepTheMappingAlive) {
  GgufFile copy = [&] { return GgufFile::open(write("all.gguf", entries_of_every_type())); }();
  const GgufFile other = copy;
  copy = GgufFile::open(write("small.gguf", GgufText().str()));
  EXPECT_EQ(other.at("strings").strings().size(), 3U);
}

TEST_F(Gguf, DamagedFilesLoadOrThrow) {
  const std::string good = GgufText()
                               .text("general.name", "x")
                               .u32("general.alignment", 32)
                               .array("s", GgufType::string, 2, gguf_string("ab") + gguf_string("c"))
                               .array("n", GgufType::u16, 2, "abcd")
                               .tensor("a", {2, 4})
                               .tensor("b", {8})
                               .str();
  expect_survival(good, [&](const std::string& bytes) {
    const GgufFile file = GgufFile::open(write("bad.gguf", bytes));
    std::vector<float> values;
    for (const StoredTensor& tensor : file.tensors()) {
      values.resize(static_cast<std::size_t>(tensor.count()));
      dequantise(tensor, 0, tensor.count() / tensor.row_length(), values.data());
    }
    if (const auto strings = file.find("s"); strings && strings->is_array()) strings->strings();
    if (const auto numbers = file.find("n"); numbers && numbers->is_array()) numbers->integers();
  });
}

TEST_F(Gguf, RowsOfPartialBlocksThrow) {
  constexpr std::uint32_t kQ8 = 8, kQ4K = 12;
  const auto complaint = [&](const std::vector<std::int64_t>& shape, std::uint32_t type) {
    return complaint_of([&] { GgufFile::open(write("t.gguf", GgufText().tensor("w", shape, type).str())); });
  };
  const std::string expected = (folder_ / "t.gguf").string() +
                               ": expected tensor 'w' with rows of whole blocks and a size of 63 bits, got ";
  EXPECT_EQ(complaint({2, 32}, kQ8), "");
  EXPECT_EQ(complaint({32, 48}, kQ8), expected + "Q8_0 [32, 48]");
  EXPECT_EQ(complaint({2, 256}, kQ4K), "");
  EXPECT_EQ(complaint({256, 128}, kQ4K), expected + "Q4_K [256, 128]");
  EXPECT_EQ(complaint({16}, kQ4K), expected + "Q4_K [16]");
}

TEST_F(Gguf, UnsupportedTensorTypesThrow) {
  const auto complaint = [&](std::uint32_t type) {
    return complaint_of([&] { GgufFile::open(write("t.gguf", GgufText().tensor("w", {256}, type).str())); });
  };
  const std::string expected =
      (folder_ / "t.gguf").string() +
      ": expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K in tensor 'w', got ";
  EXPECT_EQ(complaint(20), expected + "IQ4_NL");
  EXPECT_EQ(complaint(28), expected + "F64");
  EXPECT_EQ(complaint(4), expected + "type 4");
  EXPECT_EQ(complaint(0xFFFFFFFF), expected + "type 4294967295");
}

TEST_F(Gguf, SizesBeyondTheFileThrow) {
  const std::int64_t huge = std::int64_t{1} << 40;
  std::string bytes = GgufText().tensor("w", {2, 32}).str();
  const std::size_t size = bytes.find(bytes_of(std::int64_t{32}));
  bytes.replace(size, 8, bytes_of(huge));
  const auto path = write("t.gguf", bytes);
  EXPECT_EQ(complaint_of([&] { GgufFile::open(path); }),
            path.string() +
                ": expected tensor 'w' (F32 [2, 1099511627776]), 8796093022208 bytes at offset 0, "
                "got 256 bytes of data");
}

TEST_F(Gguf, RecognisesGgufFiles) {
  EXPECT_TRUE(GgufFile::is_gguf(write("a", "GGUF")));
  EXPECT_FALSE(GgufFile::is_gguf(write("b", "GGU")));
  EXPECT_FALSE(GgufFile::is_gguf(folder_));
  EXPECT_FALSE(GgufFile::is_gguf(folder_ / "missing"));
}

}  // namespace
}  // namespace moba::llm
