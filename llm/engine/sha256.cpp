#include "llm/engine/sha256.h"

#include <fmt/format.h>
#include <openssl/evp.h>

#include <new>
#include <stdexcept>

namespace moba::llm {
namespace {

EVP_MD_CTX* context_of(void* context) {
  return static_cast<EVP_MD_CTX*>(context);
}

void check(int is_done) {
  if (is_done != 1) throw std::runtime_error("libcrypto: expected SHA-256, got an error");
}

}  // namespace

void Sha256::Delete::operator()(void* context) const {
  EVP_MD_CTX_free(context_of(context));
}

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  if (!context_) throw std::bad_alloc();
  check(EVP_DigestInit_ex(context_of(context_.get()), EVP_sha256(), nullptr));
}

Sha256& Sha256::add(std::span<const std::byte> bytes) {
  check(EVP_DigestUpdate(context_of(context_.get()), bytes.data(), bytes.size()));
  return *this;
}

Sha256Digest Sha256::finish() {
  Sha256Digest digest;
  check(EVP_DigestFinal_ex(context_of(context_.get()), digest.data(), nullptr));
  return digest;
}

std::string hex(const Sha256Digest& digest) {
  std::string digits;
  for (const std::uint8_t byte : digest) digits += fmt::format("{:02x}", byte);
  return digits;
}

}  // namespace moba::llm
