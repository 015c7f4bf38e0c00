// Whole tokenizers in files written here: their token ids, and files that are refused.
#include "llm/tokenizer/tokenizer.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "llm/error.h"
#include "llm/tokenizer/bpe.h"
#include "llm/tokenizer/utf8.h"

namespace moba::llm {
namespace {

using nlohmann::json;
using Ids = std::vector<std::int32_t>;

/// Test with a temporary Hugging Face folder.
class TokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    const std::string name = testing::UnitTest::GetInstance()->current_test_info()->name();
    folder_ = std::filesystem::temp_directory_path() / ("moba_tokenizer_" + name + std::to_string(getpid()));
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }
  Tokenizer open(const json& document) const {
    write("tokenizer.json", document.dump());
    return Tokenizer::open(folder_);
  }
  /// Returns the message that refuses the folder, after checking that it is one line that names `file`.
  std::string refusal(const std::string& file) const {
    try {
      Tokenizer::open(folder_);
    } catch (const DataError& error) {
      std::string message = error.what();
      EXPECT_NE(message.find(file.empty() ? folder_.string() : (folder_ / file).string()), std::string::npos)
          << message;
      EXPECT_NE(message.find("expected"), std::string::npos) << message;
      EXPECT_NE(message.find("got "), std::string::npos) << message;
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
      EXPECT_EQ(message.find("json.exception"), std::string::npos) << message;
      return message;
    } catch (const std::exception& error) {
      ADD_FAILURE() << "expected a DataError, got: " << error.what();
      return "";
    }
    ADD_FAILURE() << "accepted";
    return "";
  }
  std::string refusal_of(const json& document) const {
    write("tokenizer.json", document.dump());
    return refusal("tokenizer.json");
  }

  std::filesystem::path folder_;
};

/// Returns a byte-level model of the 256 bytes and two merges: "ab", "abab".
json byte_level() {
  json vocab = json::object();
  for (int byte = 0; byte < 256; ++byte) {
    std::string character;
    utf8_append(character, byte_character(static_cast<unsigned char>(byte)));
    vocab[character] = byte;
  }
  vocab["ab"] = 256;
  vocab["abab"] = 257;
  return {{"added_tokens", {{{"id", 258}, {"content", "<end>"}, {"special", true}}}},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"a b", json{"ab", "ab"}}}}}};
}

TEST_F(TokenizerTest, MergesBytes) {
  const Tokenizer tokenizer = open(byte_level());
  EXPECT_EQ(tokenizer.encode("ababab", true, true), (Ids{257, 256}));
  EXPECT_EQ(tokenizer.encode("", true, true), Ids{});
  EXPECT_EQ(tokenizer.encode("a<end>", true, true), (Ids{'a', 258}));
  EXPECT_EQ(tokenizer.encode("a<end>", true, false), (Ids{'a', '<', 'e', 'n', 'd', '>'}));
  EXPECT_EQ(tokenizer.encode({{"<end>", true}, {"<end>", false}}), (Ids{258, '<', 'e', 'n', 'd', '>'}));
  EXPECT_EQ(tokenizer.encode({{"<en", true}, {"d>", false}}), (Ids{'<', 'e', 'n', 'd', '>'}));
  EXPECT_EQ(tokenizer.vocab_size(), 259);
  EXPECT_EQ(tokenizer.id_of("abab"), 257);
  EXPECT_EQ(tokenizer.id_of("nothing"), -1);
  EXPECT_EQ(tokenizer.bos(), -1);
}

TEST_F(TokenizerTest, DecodesSpecialTokensOnlyOnRequest) {
  const Tokenizer tokenizer = open(byte_level());
  EXPECT_EQ(tokenizer.decode({257, 258}), "abab");
  EXPECT_EQ(tokenizer.decode({257, 258}, true), "abab<end>");
  for (const std::int32_t id : {-1, 259, 1 << 30}) EXPECT_EQ(tokenizer.piece(id, true), "");
}

TEST_F(TokenizerTest, EncodingRoundTripsEveryByte) {
  const Tokenizer tokenizer = open(byte_level());
  std::mt19937 random(1);
  for (int trial = 0; trial < 500; ++trial) {
    std::string text(random() % 200, '\0');
    for (char& c : text)
      c = static_cast<char>(random() % (trial % 2 == 0 ? 256 : 4) + (trial % 2 == 0 ? 0 : 'a'));
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, true, false)), text);
  }
}

TEST_F(TokenizerTest, EncodesVeryLongWords) {
  const Tokenizer tokenizer = open(byte_level());
  std::string word;
  for (int i = 0; i < 1'000'000; ++i) word += "ab";
  EXPECT_EQ(tokenizer.encode(word, true, true), Ids(500'000, 257));
}

TEST_F(TokenizerTest, ReadsConfigurationFilesOfTheFolder) {
  write("tokenizer_config.json", R"({"bos_token": {"content": "ab"}, "eos_token": "<end>",
        "chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]})");
  write("generation_config.json", R"({"eos_token_id": [258, 7]})");
  const Tokenizer tokenizer = open(byte_level());
  EXPECT_EQ(tokenizer.bos(), 256);
  EXPECT_EQ(tokenizer.end_tokens(), (Ids{258, 7}));
  EXPECT_EQ(tokenizer.chat_template(), "d");
  write("chat_template.jinja", "from a file of its own");
  EXPECT_EQ(Tokenizer::open(folder_).chat_template(), "from a file of its own");
}

TEST_F(TokenizerTest, UnkTokenFuseUnkAndByteFallbackApply) {
  json document = {{"model", {{"type", "BPE"}, {"vocab", {{"a", 0}, {"?", 1}}}, {"merges", json::array()}}}};
  EXPECT_EQ(open(document).encode("axya", true, true), (Ids{0, 0}));
  document["model"]["unk_token"] = "?";
  EXPECT_EQ(open(document).encode("axy\xFF"
                                  "a",
                                  true, true),
            (Ids{0, 1, 1, 1, 0}));
  document["model"]["fuse_unk"] = true;
  EXPECT_EQ(open(document).encode("axya", true, true), (Ids{0, 1, 0}));
  document["model"]["byte_fallback"] = true;
  document["model"]["vocab"]["<0xFF>"] = 2;
  EXPECT_EQ(open(document).encode("\xFF\xFE"
                                  "a",
                                  true, true),
            (Ids{2, 1, 0}));
}

TEST_F(TokenizerTest, FolderWithoutATokenizerThrows) {
  EXPECT_NE(refusal("").find("neither"), std::string::npos);
}

TEST_F(TokenizerTest, InvalidJsonThrows) {
  for (const std::string& text :
       {std::string(), std::string("GGUF"), std::string("{\"model\": "), std::string("\xFF"),
        std::string("[]"), std::string("null"), std::string("{}"), std::string(100'000, '[')}) {
    write("tokenizer.json", text);
    refusal("tokenizer.json");
  }
}

TEST_F(TokenizerTest, TokenizerJsonThatIsAFolderThrows) {
  std::filesystem::create_directories(folder_ / "tokenizer.json");
  refusal("tokenizer.json");
}

TEST_F(TokenizerTest, InvalidMembersThrow) {
  const auto with = [](const char* pointer, const json& value) {
    json document = byte_level();
    document[json::json_pointer(pointer)] = value;
    return document;
  };
  const std::vector<std::pair<json, const char*>> cases{
      {with("/model", 7), "model"},
      {with("/model/type", "Unigram"), "'Unigram'"},
      {with("/model/vocab", json::array()), "vocab"},
      {with("/model/vocab", nullptr), "vocab"},
      {with("/model/vocab/ab", "256"), "'ab'"},
      {with("/model/vocab/ab", -1), "-1"},
      {with("/model/vocab/ab", 4'000'000'000), "4000000000"},
      {with("/model/vocab/ab", 18'446'744'073'709'551'615u), "'ab'"},
      {with("/model/vocab/ab", 1.5), "'ab'"},
      {with("/model/vocab/ab", 97), "id 97"},
      {with("/model/merges", {{"a", 1}}), "merges"},
      {with("/model/merges/0", "ab"), "'ab'"},
      {with("/model/merges/0", "a b c"), "'a b c'"},
      {with("/model/merges/0", json{"a"}), "merges[0]"},
      {with("/model/merges/0", json{"a", 3}), "merges[0][1]"},
      {with("/model/merges/0", "a zz"), "'zz'"},
      {with("/model/merges/0", "b b"), "'bb'"},
      {with("/model/dropout", 0.1), "dropout"},
      {with("/model/unk_token", "zz"), "'zz'"},
      {with("/model/ignore_merges", "yes"), "ignore_merges"},
      {with("/model/end_of_word_suffix", "</w>"), "'</w>'"},
      {with("/normalizer", {{"type", "BertNormalizer"}}), "'BertNormalizer'"},
      {with("/normalizer", {{"type", "Replace"}, {"pattern", {{"String", ""}}}, {"content", "x"}}),
       "normalizer"},
      {with("/pre_tokenizer", {{"type", "Whitespace"}}), "'Whitespace'"},
      {with("/pre_tokenizer", {{"type", "Split"}, {"pattern", {{"Regex", "("}}}, {"behavior", "Isolated"}}),
       "'('"},
      {with("/pre_tokenizer", {{"type", "Split"}, {"pattern", {{"Regex", "a"}}}, {"behavior", "Odd"}}),
       "'Odd'"},
      {with("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", 1}}), "pretokenizers"},
      {with("/pre_tokenizer", "ByteLevel"), "pre_tokenizer"},
      {with("/post_processor", {{"type", "BertProcessing"}}), "'BertProcessing'"},
      {with("/post_processor", {{"type", "TemplateProcessing"}, {"single", json::array()}}), "Sequence"},
      {with("/added_tokens/0/id", 97), "97"},
      {with("/added_tokens/0/id", "258"), "added_tokens[0].id"},
      {with("/added_tokens/0/content", "ab"), "'ab'"},
      {with("/added_tokens/0", 3), "added_tokens[0]"},
  };
  for (const auto& [document, mention] : cases) {
    const std::string message = refusal_of(document);
    EXPECT_NE(message.find(mention), std::string::npos) << message;
  }
}

TEST_F(TokenizerTest, TooDeepSequencesThrow) {
  json nested = {{"type", "NFC"}};
  for (int depth = 0; depth < 1000; ++depth) nested = {{"type", "Sequence"}, {"normalizers", {nested}}};
  json document = byte_level();
  document["normalizer"] = nested;
  refusal_of(document);
}

TEST_F(TokenizerTest, InvalidConfigurationFilesThrow) {
  write("tokenizer.json", byte_level().dump());
  write("tokenizer_config.json", R"({"bos_token": 4})");
  refusal("tokenizer_config.json");
  write("tokenizer_config.json", "{}");
  write("generation_config.json", R"({"eos_token_id": "2"})");
  refusal("generation_config.json");
}

std::string field(char tag, const std::string& bytes) {
  return std::string(1, tag) + static_cast<char>(bytes.size()) + bytes;
}

/// Returns one piece of a tokenizer.model.
std::string piece(const std::string& text, float score, char kind) {
  const std::string number(reinterpret_cast<const char*>(&score), sizeof score);
  return field('\x0A', field('\x0A', text) + '\x15' + number + '\x18' + kind);
}

const std::string kBpeModel = field('\x12', "\x18\x02");
const std::string kKeepSpaces = field('\x1A', std::string("\x20\x00", 2));

std::string small_model() {
  return piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3) + piece("a", -1, 1) +
         piece("b", -2, 1) + piece("ab", -0.5F, 1) + piece("\u2581", -3, 1) + kBpeModel + kKeepSpaces;
}

TEST_F(TokenizerTest, ReadsASentencePieceModel) {
  write("tokenizer.model", small_model());
  const Tokenizer tokenizer = Tokenizer::open(folder_);
  EXPECT_EQ(tokenizer.encode("ab ba", true, true), (Ids{1, 6, 5, 6, 4, 3}));
  EXPECT_EQ(tokenizer.encode("ab", false, true), (Ids{6, 5}));
  EXPECT_EQ(tokenizer.encode("a</s>", false, true), (Ids{6, 3, 2}));
  EXPECT_EQ(tokenizer.encode("axya", false, true), (Ids{6, 3, 0, 3}));
  EXPECT_EQ(tokenizer.encode("", false, true), Ids{});
  EXPECT_EQ(tokenizer.decode({1, 6, 5, 6, 4, 3}), "ab ba");
  EXPECT_EQ(tokenizer.end_tokens(), Ids{2});
}

TEST_F(TokenizerTest, TruncatedSentencePieceModelsThrow) {
  const std::string whole = small_model();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    write("tokenizer.model", whole.substr(0, size));
    refusal("tokenizer.model");
  }
}

TEST_F(TokenizerTest, UnsupportedSentencePieceModelsThrow) {
  const std::string pieces = piece("<unk>", 0, 2) + piece("a", -1, 1);
  const std::vector<std::pair<std::string, const char*>> cases{
      {pieces + kKeepSpaces, "BPE"},
      {pieces + kBpeModel, "remove_extra_whitespaces"},
      {pieces + kBpeModel + field('\x1A', std::string("\x12\x01x\x20\x00", 5)), "character map"},
      {pieces + pieces + kBpeModel + kKeepSpaces, "'<unk>'"},
      {pieces + piece("<0xZZ>", 0, 6) + kBpeModel + kKeepSpaces, "'<0xZZ>'"},
      {pieces + piece("b", 0, 9) + kBpeModel + kKeepSpaces, "9"},
      {pieces + piece("b", std::nanf(""), 1) + kBpeModel + kKeepSpaces, "NaN"},
      {"\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01", "bytes"},
      {"not a model", "protobuf"},
  };
  for (const auto& [bytes, mention] : cases) {
    write("tokenizer.model", bytes);
    const std::string message = refusal("tokenizer.model");
    EXPECT_NE(message.find(mention), std::string::npos) << message;
  }
}

TEST_F(TokenizerTest, CorruptedSentencePieceModelsLoadOrThrow) {
  const std::string whole = small_model();
  std::mt19937 random(2);
  for (int trial = 0; trial < 1000; ++trial) {
    std::string bytes = whole;
    for (int flips = 0; flips < 3; ++flips) bytes[random() % bytes.size()] = static_cast<char>(random());
    write("tokenizer.model", bytes);
    try {
      Tokenizer::open(folder_).encode("ab \xFF<s>", true, true);
    } catch (const DataError&) {
    }
  }
}

TEST_F(TokenizerTest, ChatTurnsFollowTheTemplate) {
  json document = byte_level();
  document["added_tokens"] = {{{"id", 258}, {"content", "<|im_start|>"}, {"special", true}},
                              {{"id", 259}, {"content", "<|im_end|>"}, {"special", true}}};
  write("chat_template.jinja", "{{ '<|im_start|>system\\nBe good.<|im_end|>\\n' }} and so on");
  const Tokenizer tokenizer = open(document);
  const std::string text = tokenizer.decode(apply_chat_template(tokenizer, {{"user", "<|im_end|>"}}), true);
  EXPECT_EQ(text,
            "<|im_start|>system\nBe "
            "good.<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n");
}

}  // namespace
}  // namespace moba::llm
