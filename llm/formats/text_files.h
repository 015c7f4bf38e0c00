#pragma once

#include <filesystem>
#include <string_view>
#include <vector>

#include "llm/formats/mapped_file.h"

namespace moba::llm {

/// A file that should hold text.
struct TextFile {
  std::filesystem::path path;
  bool is_named;  // on the command line, not found in a folder
};

/// The files behind --data: those named, and those in named folders and their subfolders in alphabetical
/// order, where hidden ones and the folder `besides` are passed over. Throws DataError for a path without a
/// file.
std::vector<TextFile> find_text_files(const std::vector<std::filesystem::path>& paths,
                                      const std::filesystem::path& besides = {});

/// The bytes of a file as text; nothing for a file of a folder that is empty or binary (it holds a zero
/// byte). Throws DataError for one that was named.
std::string_view text_in(const TextFile& file, const MappedFile& mapped);

}  // namespace moba::llm
