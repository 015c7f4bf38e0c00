#include "llm/formats/json.h"

#include <sys/stat.h>

#include "build_files.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/quoted.h"

namespace moba::llm {
namespace {

TEST(Json, ErrorsNameTheJsonPath) {
  const nlohmann::json document = parse_json(R"({"a": {"b": [1, "x", 1.5, null]}, "n": null})", "f.json");
  const JsonValue root(document, "f.json");
  EXPECT_EQ(root.at("a").at("b").element(0).integer(), 1);
  EXPECT_EQ(root.at("a").at("b").element(2).number(), 1.5);
  EXPECT_FALSE(root.find("n"));
  EXPECT_FALSE(root.find("missing"));
  EXPECT_EQ(complaint_of([&] { root.at("a").at("b").element(1).integer(); }),
            "f.json: a.b[1]: expected an integer of 64 bits, got 'x'");
  EXPECT_EQ(complaint_of([&] { root.at("a").at("c"); }), "f.json: a: expected a member 'c', got none");
  EXPECT_EQ(complaint_of([&] { root.at("a").boolean(); }),
            "f.json: a: expected true or false, got an object");
  EXPECT_EQ(complaint_of([&] { root.at("a").at("b").element(2).integer(); }),
            "f.json: a.b[2]: expected an integer of 64 bits, got 1.5");
  EXPECT_EQ(complaint_of([&] { root.at("a").at("b").object(); }),
            "f.json: a.b: expected an object, got an array of 4");
}

TEST(Json, InvalidJsonThrows) {
  const auto complaint = [](std::string_view text) { return complaint_of([&] { parse_json(text, "f"); }); };
  EXPECT_EQ(complaint(""), "f: expected JSON, got something else at byte 1");
  EXPECT_EQ(complaint("{\"a\": 1,}"), "f: expected JSON, got something else at byte 9");
  EXPECT_EQ(complaint("[\"\xFF\"]"), "f: expected JSON, got something else at byte 3");
  EXPECT_EQ(complaint("[1e999]"), "f: expected JSON, got a number out of range");
  EXPECT_EQ(complaint("{\"a\": 1, \"a\": 2}"), "f: expected each member once, got 'a' twice");
  EXPECT_EQ(complaint(std::string(64, '[') + std::string(64, ']')), "");
  EXPECT_EQ(complaint(std::string(65, '[')), "f: expected JSON nested at most 64 deep, got more");
  EXPECT_EQ(complaint(std::string(5'000'000, '[')), "f: expected JSON nested at most 64 deep, got more");
  const nlohmann::json big = parse_json("[18446744073709551615]", "f");
  EXPECT_NE(complaint_of([&] { JsonValue(big, "f").element(0).integer(); }), "");
}

TEST(Quoted, EscapesAndTruncatesToOneLine) {
  EXPECT_EQ(quoted("a\nb\x1B[0m"), "'a\\x0ab\\x1b[0m'");
  EXPECT_EQ(llm::quoted(std::string(81, 'x')), "'" + std::string(80, 'x') + "...'");
}

using Files = WithFolder;

TEST_F(Files, UnreadableAndSpecialFilesThrow) {
  const auto complaint = [](const std::filesystem::path& path) {
    return complaint_of([&] { MappedFile file(path); }).substr(path.string().size());
  };
  EXPECT_EQ(complaint(folder_ / "missing"), ": expected a readable file, got No such file or directory");
  EXPECT_EQ(complaint(folder_), ": expected a readable file, got a folder");
  ASSERT_EQ(mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(complaint(folder_ / "pipe"), ": expected a readable file, got a pipe or a device");
  EXPECT_EQ(complaint("/dev/zero"), ": expected a readable file, got a pipe or a device");
  EXPECT_TRUE(MappedFile(write("empty", "")).bytes().empty());
  EXPECT_EQ(MappedFile(write("three", "abc")).bytes().size(), 3U);
}

TEST_F(Files, TooLargeJsonThrows) {
  const auto path = write("big.json", "[1, 2, 3]");
  EXPECT_EQ(load_json(path, 9).size(), 3U);
  EXPECT_EQ(complaint_of([&] { load_json(path, 8); }),
            path.string() + ": expected JSON of at most 8 bytes, got 9 bytes");
}

}  // namespace
}  // namespace moba::llm
