#pragma once

#include <string>
#include <string_view>

namespace moba::app {

/// Returns the Content-Security-Policy of a page that loads nothing: its own script and style, by their
/// hashes, requests to its server, and no frame around it.
std::string content_security_policy(std::string_view page);

}  // namespace moba::app
