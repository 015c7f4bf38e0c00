#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "app/commands.h"
#include "app/document.h"
#include "app/inspect_page.h"
#include "app/plot/picture.h"
#include "app/progress.h"
#include "app/session_flags.h"
#include "llm/error.h"
#include "llm/eval/prompt.h"
#include "llm/eval/routing_map.h"
#include "llm/formats/output_file.h"
#include "llm/formats/weights.h"
#include "llm/session/text_stream.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::app {
namespace {

using llm::UsageError;
using llm::eval::HeadMap;
using llm::eval::RoutingMap;

/// Most bytes of block texts on a page.
constexpr std::size_t kMaxText = std::size_t{1} << 20;

struct InspectFlags : SessionFlags {
  std::optional<std::string> prompt, file;
  std::vector<std::string> outputs{"routing.html"};
  bool chat = true;
};

/// The contents of a page or a picture.
struct Inspection {
  std::string model;
  std::vector<std::int32_t> tokens;
  std::vector<std::string> texts;  // of the blocks
  llm::SessionSettings session;
  std::vector<bool> reads_fully;
  RoutingMap map;
};

std::vector<std::string> block_texts(const llm::Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens,
                                     std::int64_t block_size) {
  std::vector<std::string> texts;
  for (auto begin = tokens.begin(); begin != tokens.end();) {
    const auto end = begin + std::min<std::int64_t>(block_size, tokens.end() - begin);
    llm::TextStream stream;
    std::string text = stream.push(tokenizer.decode({begin, end}, /*show_special=*/true));
    texts.push_back(text + stream.finish());
    begin = end;
  }
  const std::size_t max_size = std::max<std::size_t>(100, kMaxText / texts.size());
  for (std::string& text : texts) {
    if (text.size() > max_size) text = llm::TextStream().push(text.substr(0, max_size)) + "\u2026";
  }
  return texts;
}

/// Three or so digits: what a page says, in few bytes.
nlohmann::ordered_json rounded(double value) {
  return std::isfinite(value) ? nlohmann::ordered_json::parse(fmt::format("{:.4g}", value))
                              : nlohmann::ordered_json();
}

nlohmann::ordered_json to_json(const HeadMap& head) {
  double all = 0;
  for (const std::int64_t count : head.places) all += static_cast<double>(count);
  nlohmann::ordered_json json{{"shares", nlohmann::json::array()},
                              {"margin", rounded(mean(head.margins))},
                              {"margins", nlohmann::json::array()}};
  for (const std::int64_t count : head.places) json["shares"].push_back(static_cast<double>(count) / all);
  for (const llm::eval::Portion& row : head.margins)
    json["margins"].push_back(rounded(llm::eval::mean({row})));
  return json;
}

nlohmann::ordered_json to_json(const Inspection& inspection) {
  const RoutingMap& map = inspection.map;
  nlohmann::ordered_json json{{"model", inspection.model},
                              {"tokens", map.tokens},
                              {"block_size", map.block_size},
                              {"top_k", inspection.session.moba.top_k},
                              {"sink_blocks", inspection.session.moba.sink_blocks},
                              {"calibrated", !inspection.session.layers.empty()},
                              {"heads", map.layers.front().size()},
                              {"rows", map.rows},
                              {"columns", map.columns},
                              {"queries_in_row", map.queries_in_row},
                              {"blocks_in_column", map.blocks_in_column},
                              {"layers", nlohmann::json::array()},
                              {"texts", inspection.texts}};
  for (std::size_t l = 0; l < map.layers.size(); ++l) {
    nlohmann::ordered_json layer{{"full", bool{inspection.reads_fully[l]}},
                                 {"heads", nlohmann::json::array()}};
    for (const HeadMap& head : map.layers[l]) layer["heads"].push_back(to_json(head));
    json["layers"].push_back(layer);
  }
  return json;
}

/// The share of a row's queries that selected a block of the column, at most 1.
double share_at(const RoutingMap& map, const HeadMap& head, std::int64_t row, std::int64_t column) {
  const std::int64_t queries = std::min(map.queries_in_row, map.tokens - row * map.queries_in_row);
  const double chosen = head.chosen[static_cast<std::size_t>(row * map.columns + column)];
  return std::min(1.0, chosen / static_cast<double>(queries));
}

/// A character a cell, which the page takes apart again: none of them means anything to HTML.
std::string packed(const RoutingMap& map) {
  std::string text;
  for (const auto& layer : map.layers) {
    for (const HeadMap& head : layer) {
      for (std::int64_t row = 0; row < map.rows; ++row) {
        for (std::int64_t column = 0; column < map.columns; ++column)
          text += static_cast<char>('0' + std::lround(63 * share_at(map, head, row, column)));
      }
    }
  }
  return text;
}

std::string replaced(std::string text, const std::string& mark, const std::string& by) {
  return text.replace(text.find(mark), mark.size(), by);
}

void write_page(const std::filesystem::path& path, const Inspection& inspection) {
  std::string data =
      to_json(inspection).dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  for (std::size_t at = 0; (at = data.find('<', at)) != std::string::npos;)
    data.replace(at, 1, "\\u003c");  // so that no text can end the script it is in
  llm::write_file(path,
                  replaced(replaced(kInspectPage, "{{MAPS}}", packed(inspection.map)), "{{DATA}}", data));
}

/// A few numbers from 0 to `count` - 1, spread evenly.
std::vector<std::size_t> spread(std::size_t count, std::size_t max_count) {
  std::vector<std::size_t> numbers;
  const std::size_t taken = std::min(count, max_count);
  for (std::size_t i = 0; i < taken; ++i) numbers.push_back(taken == 1 ? 0 : i * (count - 1) / (taken - 1));
  return numbers;
}

/// At most 128 bands of rows and 16 shades: what an eye can tell apart, and a small file.
void draw_map(Picture& picture, Point corner, double side, const RoutingMap& map, const HeadMap& head,
              std::int64_t block_size) {
  const std::int64_t band = (map.rows + 127) / 128;
  const double width = side / static_cast<double>(map.columns), height = side / static_cast<double>(map.rows);
  picture.fill(corner, side, side, {0.965, 0.973, 0.980});
  for (std::int64_t first = 0; first < map.rows; first += band) {
    const std::int64_t rows = std::min(band, map.rows - first);
    const std::int64_t own = first * map.queries_in_row / block_size / map.blocks_in_column;
    for (std::int64_t column = 0; column <= own; ++column) {
      double sum = 0;
      for (std::int64_t row = first; row < first + rows; ++row) sum += share_at(map, head, row, column);
      const double share = std::round(15 * sum / static_cast<double>(rows)) / 15;
      const Colour far{1 - 0.18 * share, 1 - 0.65 * share, 1 - 0.88 * share};
      picture.fill(
          {corner.x + width * static_cast<double>(column), corner.y + height * static_cast<double>(first)},
          width, height * static_cast<double>(rows), column == own ? Colour{0.035, 0.41, 0.855} : far);
    }
  }
}

/// Four layers with four heads each, or as many as there are.
void draw_picture(const std::filesystem::path& path, const Inspection& inspection) {
  constexpr double kSide = 170, kGap = 14, kLeft = 64, kTop = 84, kBottom = 36;
  const RoutingMap& map = inspection.map;
  const std::vector<std::size_t> layers = spread(map.layers.size(), 4),
                                 heads = spread(map.layers[0].size(), 4);
  const double width = kLeft + static_cast<double>(heads.size()) * (kSide + kGap) + 10;
  Picture picture(std::max(width, 640.0),
                  kTop + static_cast<double>(layers.size()) * (kSide + kGap) + kBottom);
  const Routing& moba = inspection.session.moba;
  const std::string routing = inspection.session.layers.empty()
                                  ? fmt::format("{} of {} blocks of {} for each query",
                                                std::min(moba.top_k, map.blocks), map.blocks, moba.block_size)
                                  : "blocks by a calibration of each layer";
  picture.text({kLeft, 28}, fmt::format("What MoBA reads: {}", inspection.model), 15);
  picture.text({kLeft, 48}, fmt::format("{} tokens, {}; queries down, blocks across", map.tokens, routing),
               12, Align::left, kMuted);
  for (std::size_t h = 0; h < heads.size(); ++h) {
    const double x = kLeft + static_cast<double>(h) * (kSide + kGap);
    picture.text({x + kSide / 2, kTop - 8}, fmt::format("head {}", heads[h]), 12, Align::centre);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const double y = kTop + static_cast<double>(l) * (kSide + kGap);
      if (h == 0)
        picture.text({kLeft - 10, y + kSide / 2}, fmt::format("layer {}", layers[l]), 12, Align::right);
      draw_map(picture, {x, y}, kSide, map, map.layers[layers[l]][heads[h]], map.block_size);
    }
  }
  const double y = kTop + static_cast<double>(layers.size()) * (kSide + kGap) + 12;
  picture.fill({kLeft, y - 9}, 12, 10, {0.035, 0.41, 0.855});
  picture.text({kLeft + 18, y}, "own block", 12);
  picture.fill({kLeft + 100, y - 9}, 12, 10, {0.82, 0.35, 0.12});
  picture.text({kLeft + 118, y}, "selected by the gate, the stronger the more of the queries", 12);
  picture.save(path);
}

std::vector<std::int32_t> tokens_from(const InspectFlags& flags, const llm::Tokenizer& tokenizer) {
  std::string text = flags.file ? read_document(*flags.file) : *flags.prompt;
  if (flags.file && flags.prompt) text += "\n\n" + *flags.prompt;
  std::vector<std::int32_t> tokens =
      llm::eval::tokens_of({text, ""}, tokenizer, llm::eval::asks_by_chat(tokenizer, !flags.chat));
  if (tokens.empty()) {
    throw UsageError(fmt::format("{}: expected at least one token, got an empty text",
                                 flags.file ? "-f/--file" : "-p/--prompt"));
  }
  return tokens;
}

int inspect(const FlagTable& table, InspectFlags& flags) {
  if (!flags.prompt && !flags.file) throw UsageError("expected -p/--prompt or -f/--file, got neither");
  const llm::Weights weights = llm::Weights::open(flags.model);
  const llm::ModelConfig& config = weights.config();
  complete(table, weights, flags);
  Inspection inspection;
  inspection.session = flags.session;
  check(inspection.session, config);
  const llm::Tokenizer tokenizer = llm::Tokenizer::open(flags.model);
  inspection.tokens = tokens_from(flags, tokenizer);
  inspection.model = std::filesystem::absolute(flags.model).lexically_normal().filename().string();
  const llm::SessionSettings& session = inspection.session;
  std::vector<Routing> gates =
      llm::layer_routings(session.moba, session.layers, session.full_layers, config.layers);
  for (Routing& gate : gates) {
    inspection.reads_fully.push_back(session.prefill == llm::AttentionMode::full || llm::is_full(gate));
    if (!llm::is_full(gate)) continue;  // shows what its gate would select
    gate.top_k = session.moba.top_k;
    gate.sink_blocks = session.moba.sink_blocks;
  }

  llm::use_threads(inspection.session.threads);
  const llm::Model model = llm::Model::load(weights, flags.arithmetic);
  note_interrupts();
  try {
    ProgressLine progress("reading", static_cast<double>(inspection.tokens.size()));
    inspection.map = llm::eval::map_routing(
        model, inspection.tokens,
        {.layers = gates, .reads_fully = inspection.reads_fully, .threads = inspection.session.threads},
        std::ref(progress));
  } catch (const Interrupted&) {
    return kInterruptedCode;
  }
  inspection.texts = block_texts(tokenizer, inspection.tokens, inspection.map.block_size);
  for (const std::string& output : flags.outputs)
    (output.ends_with(".png") ? draw_picture : write_page)(output, inspection);
  return 0;
}

}  // namespace

CLI::App* add_inspect(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("inspect", "Show which blocks every layer and head selects");
  const auto table = std::make_shared<FlagTable>(*command);
  const auto flags = std::make_shared<InspectFlags>();
  add_model_flag(*table, *flags);
  table->value("-p,--prompt", flags->prompt, "TEXT", "Text to read");
  table->value("-f,--file", flags->file, "PATH", "File with text, read before that of -p; -: standard input");
  const auto has_known_type = [](const std::string& path) {
    const bool is_known = path.ends_with(".html") || path.ends_with(".png");
    return is_known ? "" : fmt::format("expected a name that ends in .html or .png, got {}", path);
  };
  table
      ->value("-o,--output", flags->outputs, "PATH",
              "Files to write, separated by commas: a page (.html), a picture (.png)")
      .comma_separated()
      .check(CLI::Validator(has_known_type, ""));
  add_threads_flag(*table, flags->session.threads);
  add_dtype_flag(*table, *flags);
  table->toggle("--no-chat", flags->chat, "Do not apply the chat template");

  table->group("Attention");
  flags->session.prefill = llm::AttentionMode::moba;
  const Words<llm::AttentionMode> modes{{"full", llm::AttentionMode::full},
                                        {"moba", llm::AttentionMode::moba}};
  table->choice("--attn", flags->session.prefill, modes,
                "Attention for prefill; the selection of the gate is recorded with full attention too");
  add_moba_flags(*table, *flags, /*has_tail=*/false);
  command->footer(
      "Example: a page that opens in any browser\n"
      "  moba inspect -m model.gguf -f report.txt -o routing.html\n");
  command->callback([=, &action] { action = [=] { return inspect(*table, *flags); }; });
  return command;
}

}  // namespace moba::app
