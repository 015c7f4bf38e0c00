#include "app/document.h"

#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <vector>

#include "llm/error.h"

namespace moba::app {
namespace {

using llm::DataError;

constexpr std::size_t kLargestFile = std::size_t{256} << 20;

}  // namespace

std::string read_document(const std::string& path) {
  const bool from_stdin = path == "-";
  const std::string name = from_stdin ? "standard input" : path;
  if (!from_stdin && std::filesystem::is_directory(path)) {
    throw DataError(fmt::format("-f/--file {}: expected a text file, got a folder", path));
  }
  std::ifstream file;
  if (!from_stdin) file.open(path, std::ios::binary);
  std::istream& stream = from_stdin ? std::cin : file;
  std::string text;
  std::vector<char> buffer(std::size_t{1} << 16);
  while (stream && text.size() <= kLargestFile) {
    stream.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    text.append(buffer.data(), static_cast<std::size_t>(stream.gcount()));
  }
  if (text.size() > kLargestFile) {
    throw DataError(fmt::format("-f/--file {}: expected at most {} bytes, got more", name, kLargestFile));
  }
  if (!stream.eof())
    throw DataError(fmt::format("-f/--file {}: expected a readable file, got a read error", name));
  if (text.ends_with('\n')) text.pop_back();
  return text;
}

}  // namespace moba::app
