#include "llm/tokenizer/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <new>

#include "llm/error.h"
#include "llm/formats/quoted.h"

namespace moba::llm {
namespace {

struct Range {
  char32_t first;
  char32_t last;
};

/// The ranges that Unicode 15 to 16 added to the letters and to the numbers (PCRE2 10.42 knows Unicode 14).
constexpr std::array<Range, 35> kNewLetters{{
    {0x1C89, 0x1C8A},   {0xA7CB, 0xA7CD},   {0xA7DA, 0xA7DC},   {0x105C0, 0x105F3}, {0x10D4A, 0x10D65},
    {0x10D6F, 0x10D85}, {0x10EC2, 0x10EC4}, {0x1123F, 0x11240}, {0x11380, 0x11389}, {0x1138B, 0x1138B},
    {0x1138E, 0x1138E}, {0x11390, 0x113B5}, {0x113B7, 0x113B7}, {0x113D1, 0x113D1}, {0x113D3, 0x113D3},
    {0x11BC0, 0x11BE0}, {0x11F02, 0x11F02}, {0x11F04, 0x11F10}, {0x11F12, 0x11F33}, {0x1342F, 0x1342F},
    {0x13441, 0x13446}, {0x13460, 0x143FA}, {0x16100, 0x1611D}, {0x16D40, 0x16D6C}, {0x18CFF, 0x18CFF},
    {0x1B132, 0x1B132}, {0x1B155, 0x1B155}, {0x1DF25, 0x1DF2A}, {0x1E030, 0x1E06D}, {0x1E4D0, 0x1E4EB},
    {0x1E5D0, 0x1E5ED}, {0x1E5F0, 0x1E5F0}, {0x2B739, 0x2B739}, {0x2EBF0, 0x2EE5D}, {0x31350, 0x323AF},
}};
constexpr std::array<Range, 10> kNewNumbers{{
    {0x10D40, 0x10D49},
    {0x116D0, 0x116E3},
    {0x11BF0, 0x11BF9},
    {0x11F50, 0x11F59},
    {0x16130, 0x16139},
    {0x16D70, 0x16D79},
    {0x1CCF0, 0x1CCF9},
    {0x1D2C0, 0x1D2D3},
    {0x1E4F0, 0x1E4F9},
    {0x1E5F1, 0x1E5FA},
}};

template <std::size_t N>
bool contains(const std::array<Range, N>& ranges, char32_t c) {
  const auto it = std::partition_point(ranges.begin(), ranges.end(), [c](Range r) { return r.last < c; });
  return it != ranges.end() && it->first <= c;
}

/// Returns a character of the same class and the same number of bytes.
char32_t stand_in(char32_t c) {
  constexpr char32_t kMongolianVowelSeparator = 0x180E;  // a space in Perl, no longer one in Unicode
  constexpr char32_t kZeroWidthSpace = 0x200B;           // neither letter, number nor space, three bytes
  if (c == kMongolianVowelSeparator) return kZeroWidthSpace;
  if (contains(kNewLetters, c)) return c < 0x10000 ? 0x4E00 : 0x20000;
  if (contains(kNewNumbers, c)) return 0x1D7CE;
  return c;
}

std::string pcre2_message(int error) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(error, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

PCRE2_SPTR units(std::string_view text) {
  return reinterpret_cast<PCRE2_SPTR>(text.data());
}

struct CodeDeleter {
  void operator()(const void* code) const {
    pcre2_code_free(const_cast<pcre2_code*>(static_cast<const pcre2_code*>(code)));
  }
};
struct MatchDataDeleter {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
struct MatchContextDeleter {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};

/// Returns the limit of steps: enough for the backtracking of a greedy run (`\s*[\r\n]+` gives back every
/// space of the text), too few for the exponential number that a pathological expression takes.
std::uint32_t match_limit(std::size_t text_size) {
  return static_cast<std::uint32_t>(
      std::min<std::size_t>(10'000'000 + 16 * text_size, std::numeric_limits<std::uint32_t>::max()));
}

}  // namespace

std::string class_stand_in(std::string_view text) {
  constexpr char kNotUtf8 = '\x01';
  std::string out(text);
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t size = utf8_size(text.substr(at));
    if (size == 0) {
      out[at] = kNotUtf8;
    } else if (size > 2) {
      std::string character;
      utf8_append(character, stand_in(utf8_decode(text.substr(at, size))));
      std::copy(character.begin(), character.end(), out.begin() + static_cast<std::ptrdiff_t>(at));
    }
    at += std::max<std::size_t>(size, 1);
  }
  return out;
}

Pattern Pattern::regex(const std::string& expression, std::string origin) {
  return Pattern(expression, false, std::move(origin));
}

Pattern Pattern::literal(const std::string& text, std::string origin) {
  return Pattern(text, true, std::move(origin));
}

Pattern::Pattern(const std::string& expression, bool literal, std::string origin)
    : origin_(std::move(origin)), expression_(expression) {
  // Ruby's ^ and $ work on lines.
  const std::uint32_t options =
      literal ? PCRE2_UTF | PCRE2_LITERAL : PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = pcre2_compile(units(expression), expression.size(), options, &error, &offset, nullptr);
  if (code == nullptr) {
    throw DataError(fmt::format("{}: expected a regular expression, got {} ({} at offset {})", origin_,
                                llm::quoted(expression), pcre2_message(error), offset));
  }
  code_ = std::shared_ptr<const void>(code, CodeDeleter{});
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // optional: without it matching is slower
}

std::vector<Span> Pattern::find_all(std::string_view subject) const {
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  const std::unique_ptr<pcre2_match_data, MatchDataDeleter> data(pcre2_match_data_create(1, nullptr));
  const std::unique_ptr<pcre2_match_context, MatchContextDeleter> context(
      pcre2_match_context_create(nullptr));
  if (!data || !context) throw std::bad_alloc();
  constexpr std::uint32_t kMaxKilobytes = 1 << 20;
  pcre2_set_heap_limit(context.get(), kMaxKilobytes);
  pcre2_set_match_limit(context.get(), match_limit(subject.size()));
  const auto match = [&](std::size_t from, std::uint32_t options) {
    return pcre2_match(code, units(subject), subject.size(), from, options | PCRE2_NO_UTF_CHECK, data.get(),
                       context.get());
  };
  std::vector<Span> found;
  std::size_t at = 0;
  while (at <= subject.size()) {
    int rc = match(at, 0);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) rc = match(at, PCRE2_NO_JIT);
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      throw DataError(
          fmt::format("{}: expected a regular expression that matches within {} steps, got {} ({})", origin_,
                      match_limit(subject.size()), llm::quoted(expression_), pcre2_message(rc)));
    }
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data.get());
    const Span span{bounds[0], std::max(bounds[0], bounds[1])};  // \K can put an end before its start
    const bool repeats_last_end = span.empty() && !found.empty() && span.begin == found.back().end;
    if (!repeats_last_end) found.push_back(span);
    at = span.end;
    if (span.empty()) at += at < subject.size() ? character_size(subject.substr(at)) : 1;
  }
  return found;
}

}  // namespace moba::llm
