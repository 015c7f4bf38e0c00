#pragma once

#include <filesystem>
#include <string_view>
#include <vector>

#include "llm/formats/mapped_file.h"

namespace moba::llm {

/// A text file.
struct TextFile {
  std::filesystem::path path;
  bool is_named;  // given on the command line, not found in a folder
};

/// Returns the files of --data: those given, and those in given folders and their subfolders in alphabetical
/// order, except hidden ones and the folder `besides`. Throws DataError for a path that does not exist.
std::vector<TextFile> find_text_files(const std::vector<std::filesystem::path>& paths,
                                      const std::filesystem::path& besides = {});

/// Returns the bytes of a file as text; "" for an empty or binary file of a folder (it holds a zero byte).
/// Throws DataError for such a file if it is given by name.
std::string_view text_in(const TextFile& file, const MappedFile& mapped);

}  // namespace moba::llm
