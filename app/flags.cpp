#include "app/flags.h"

#include <charconv>
#include <map>
#include <thread>

#include "app/program.h"

namespace moba::app {
namespace {

/// Returns nothing unless all of the text is a number.
template <typename T>
std::optional<T> number_from(std::string_view text) {
  T value{};
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value);
  return parsed.ec == std::errc() && parsed.ptr == end ? std::optional(value) : std::nullopt;
}

template <typename T>
CLI::Validator in_range(Range<T> range, const char* noun) {
  const auto check = [range, noun](const std::string& text) {
    const std::optional<T> value = number_from<T>(text);
    if (!value) return fmt::format("expected {}, got {}", noun, text);
    if (*value >= range.low && *value <= range.high) return std::string();  // a NaN is in no range
    return fmt::format("expected {} to {}, got {}", range.low, range.high, text);
  };
  return {check, ""};
}

/// "27-29" or "0". Returns nothing for what is no such range.
std::optional<llm::LayerRange> layer_range(std::string_view text) {
  const std::size_t dash = std::min(text.find('-'), text.size());
  const auto first = number_from<std::int64_t>(text.substr(0, dash));
  const auto last = dash < text.size() ? number_from<std::int64_t>(text.substr(dash + 1)) : first;
  if (!first || !last || *first < 0 || *last < 0) return std::nullopt;
  return llm::LayerRange{*first, *last};
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

}  // namespace

Flag::Flag(FlagTable& table, CLI::Option* option, std::string help, std::string default_text, Value value)
    : table_(&table),
      option_(option),
      help_(std::move(help)),
      default_(std::move(default_text)),
      value_(std::move(value)) {
  describe();
}

void Flag::describe() {
  option_->description(default_.empty() || option_->get_required() ? help_
                                                                   : fmt::format("{} [{}]", help_, default_));
}

Flag& Flag::required() {
  option_->required();
  describe();
  return *this;
}

Flag& Flag::excludes(const char* flag) {
  option_->excludes(flag);
  return *this;
}

Flag& Flag::comma_separated() {
  option_->delimiter(',');
  return *this;
}

Flag& Flag::check(const CLI::Validator& validator) {
  std::string names = "--" + option_->get_lnames().front();
  if (!option_->get_snames().empty()) names = fmt::format("-{}/{}", option_->get_snames().front(), names);
  const auto check = [validator, names](std::string& text) {
    std::string wrong = validator(text);
    if (!wrong.empty()) throw llm::UsageError(fmt::format("{}: {}", names, wrong));
    return wrong;
  };
  option_->transform(CLI::Validator(check, ""));  // check() would not replace the text
  return *this;
}

Flag& Flag::default_text(std::string_view text) {
  default_ = fmt::format(fmt::runtime(text), default_);
  describe();
  return *this;
}

Flag& Flag::json(Condition condition) {
  table_->report(key(), value_, std::move(condition));
  return *this;
}

std::string Flag::key() const {
  std::string key = option_->get_lnames().front();
  if (key.starts_with("no-")) key.erase(0, 3);
  std::replace(key.begin(), key.end(), '-', '_');
  return key;
}

Json Flag::description() const {
  const std::string type = option_->get_type_name();
  const bool is_list = type.find('|') == std::string::npos && type.find(',') != std::string::npos;
  const std::vector<std::string> words = split(type, is_list ? ',' : '|');
  return {{"names", split(option_->get_name(false, true), ',')},
          {"group", group()},
          {"type", option_->get_items_expected_max() == 0 ? ""
                   : words.size() > 1                     ? "WORD"
                                                          : type},
          {"words", words.size() > 1 ? words : std::vector<std::string>()},
          {"list", is_list},
          {"required", option_->get_required()},
          {"default", default_},
          {"help", help_}};
}

FlagTable::FlagTable(CLI::App& command) : command_(command) {
  add_description_flag(command, [this] { return description(); });
  group_ = command.option_defaults()->get_group();
}

void FlagTable::group(const std::string& name) {
  group_ = name;
  command_.option_defaults()->group(name);
}

Flag& FlagTable::layers(const char* names, std::vector<llm::LayerRange>& variable, const char* help) {
  const auto read = [&variable](const std::vector<std::string>& texts) {
    variable.clear();
    for (const std::string& text : texts) variable.push_back(layer_range(text).value());
  };
  const auto check = [](const std::string& text) {
    return layer_range(text) ? "" : fmt::format("expected layers such as 0,27-29, got '{}'", text);
  };
  CLI::Option* option =
      command_.add_option_function<std::vector<std::string>>(names, read)->type_name("LAYERS");
  const auto json = [&variable] { return Json(layers_in(variable)); };
  return flags_.emplace_back(*this, option, help, "none", json)
      .comma_separated()
      .check(CLI::Validator(check, ""));
}

Flag& FlagTable::toggle(const char* names, bool& variable, const char* help) {
  const auto invert = [&variable, inverse = !variable] { variable = inverse; };
  CLI::Option* option = command_.add_flag_callback(names, invert);
  return flags_.emplace_back(*this, option, help, "", [&variable] { return Json(variable); });
}

void FlagTable::report(std::string key, Flag::Value value, Flag::Condition condition) {
  reports_.push_back({group_, std::move(key), std::move(value), std::move(condition)});
}

bool FlagTable::given(const std::string& flag) const {
  const CLI::Option* option = command_.get_option_no_throw(flag);
  return option != nullptr && option->count() > 0;
}

void FlagTable::refuse(const std::string& flag, const char* why) const {
  if (given(flag)) throw llm::UsageError(fmt::format("{}: has no effect {}", flag, why));
}

Json FlagTable::json(std::string_view group) const {
  Json json;
  for (const Report& report : reports_) {
    const bool is_asked = group.empty() || report.group == group;
    if (is_asked && (!report.condition || report.condition())) json[report.key] = report.value();
  }
  return json;
}

Json FlagTable::requested() const {
  Json json;
  for (const Flag* flag : automatic_) json[flag->key()] = flag->value();
  return json;
}

Json FlagTable::description() const {
  Json json{{"description", command_.get_description()},
            {"examples", command_.get_footer()},
            {"flags", Json::array()}};
  for (const Flag& flag : flags_) json["flags"].push_back(flag.description());
  return json;
}

CLI::Validator in_range(Range<std::int64_t> range) {
  return in_range(range, "a whole number");
}

CLI::Validator in_range(Range<double> range) {
  return in_range(range, "a number");
}

CLI::Validator in_size(Range<std::int64_t> range) {
  const auto check = [range](std::string& text) {
    const std::size_t digits = std::min(text.find_last_not_of("kKmMgG") + 1, text.size());
    const std::map<std::string, int> shifts{{"", 0},   {"k", 10}, {"K", 10}, {"m", 20},
                                            {"M", 20}, {"g", 30}, {"G", 30}};
    const auto shift = shifts.find(text.substr(digits));
    const auto value = number_from<std::int64_t>(std::string_view(text).substr(0, digits));
    if (shift == shifts.end() || !value || *value > range.high >> shift->second ||
        *value << shift->second < range.low)
      return fmt::format("expected {} to {}, such as 8k or 1m, got '{}'", range.low, range.high, text);
    text = std::to_string(*value << shift->second);
    return std::string();
  };
  return {check, ""};
}

CLI::Validator one_of(Words<std::string> texts, std::string expected) {
  const auto check = [texts = std::move(texts), expected = std::move(expected)](std::string& text) {
    const auto is_it = [&](const auto& word) { return word.first == text; };
    const auto found = std::find_if(texts.begin(), texts.end(), is_it);
    if (found == texts.end()) return fmt::format("expected {}, got {}", expected, text);
    text = found->second;
    return std::string();
  };
  return {check, ""};
}

Words<std::string> words_of(const std::vector<std::string>& words) {
  Words<std::string> own;
  for (const std::string& word : words) own.emplace_back(word, word);
  return own;
}

void add_threads_flag(FlagTable& flags, int& threads, int cores) {
  threads = cores;
  flags.number("-t,--threads", threads, {1, 1024}, "CPU threads").default_text("all cores").json();
}

int core_count() {
  return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}

std::int64_t size_from(const std::string& flag, std::string text, Range<std::int64_t> range) {
  const std::string wrong = in_size(range)(text);
  if (!wrong.empty()) throw llm::UsageError(fmt::format("{}: {}", flag, wrong));
  return number_from<std::int64_t>(text).value();
}

std::string size_text(std::int64_t size) {
  for (const auto& [unit, shift] : {std::pair("g", 30), std::pair("m", 20), std::pair("k", 10)}) {
    if (size > 0 && size % (std::int64_t{1} << shift) == 0) return fmt::format("{}{}", size >> shift, unit);
  }
  return std::to_string(size);
}

}  // namespace moba::app
