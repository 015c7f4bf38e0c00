#pragma once

#include <string>

namespace moba::app {

/// The whole of the file that -f/--file names, or of standard input for "-", without the newline that ends
/// it. Throws DataError for what is no file, cannot be read or is larger than 256 MiB.
std::string read_document(const std::string& path);

}  // namespace moba::app
