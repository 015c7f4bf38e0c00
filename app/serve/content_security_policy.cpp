#include "app/serve/content_security_policy.h"

#include <fmt/format.h>
#include <openssl/evp.h>

#include "llm/engine/sha256.h"

namespace moba::app {
namespace {

/// Returns the source expression of the text between the first <tag> and </tag>.
std::string hash_of(std::string_view page, const std::string& tag) {
  const std::string open = "<" + tag + ">";
  const std::size_t begin = page.find(open) + open.size(), end = page.find("</" + tag + ">", begin);
  const llm::Sha256Digest digest = llm::Sha256().add(page.substr(begin, end - begin)).finish();
  unsigned char base64[45];  // with the final 0
  EVP_EncodeBlock(base64, digest.data(), static_cast<int>(digest.size()));
  return fmt::format("'sha256-{}'", reinterpret_cast<const char*>(base64));
}

}  // namespace

std::string content_security_policy(std::string_view page) {
  return fmt::format(
      "default-src 'none'; script-src {}; style-src {}; img-src data:; connect-src 'self'; base-uri 'none'; "
      "form-action 'none'; frame-ancestors 'none'",
      hash_of(page, "script"), hash_of(page, "style"));
}

}  // namespace moba::app
