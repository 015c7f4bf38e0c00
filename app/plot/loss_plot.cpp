#include "app/plot/loss_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "app/plot/axis.h"
#include "llm/formats/output_file.h"

namespace moba::app {
namespace {

struct Point {
  double step, loss;
  bool is_full;
};

constexpr double kWidth = 800, kHeight = 420, kLeft = 64, kRight = 20, kTop = 40, kBottom = 48;

std::vector<Point> read_points(const std::filesystem::path& log) {
  std::vector<Point> points;
  std::ifstream file(log);
  for (std::string line; std::getline(file, line);) {
    const nlohmann::json record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!record.is_object() || !record.contains("loss") || !record["loss"].is_number()) continue;
    points.push_back(
        {record.value("step", 0.0), record.value("loss", 0.0), record.value("attention", "") == "full"});
  }
  return points;
}

std::string path_of(const std::vector<Point>& points, const Axis& x, const Axis& y, const char* style) {
  std::string path;
  for (const Point& point : points)
    path += fmt::format("{}{:.1f},{:.1f}", path.empty() ? "" : " ", x.at(point.step), y.at(point.loss));
  return fmt::format("<polyline points='{}' fill='none' {}/>\n", path, style);
}

std::vector<Point> smoothed(std::vector<Point> points) {
  const double keep = 1 - 1 / std::max(1.0, static_cast<double>(points.size()) / 30);
  double mean = points.front().loss;
  for (Point& point : points) point.loss = mean = keep * mean + (1 - keep) * point.loss;
  return points;
}

std::string shades(const std::vector<Point>& points, const Axis& x) {
  const auto is_full = [](const Point& point) { return point.is_full; };
  if (std::all_of(points.begin(), points.end(), is_full)) return {};
  std::string text;
  for (auto begin = points.begin(); begin != points.end();) {
    const auto end =
        std::find_if(begin, points.end(), [&](const Point& p) { return p.is_full != begin->is_full; });
    if (begin->is_full) {
      const double from = x.at(begin->step - 0.5), to = x.at((end - 1)->step + 0.5);
      text += fmt::format("<rect x='{:.1f}' y='{}' width='{:.1f}' height='{}' fill='#f3e3c3'/>\n", from, kTop,
                          std::max(to - from, 1.0), kHeight - kTop - kBottom);
    }
    begin = end;
  }
  return text;
}

std::string axes(const Axis& x, const Axis& y) {
  std::string text;
  for (const double tick : y.ticks()) {
    text += fmt::format(
        "<path d='M{},{:.1f}H{}' stroke='#ddd'/><text x='{}' y='{:.1f}' text-anchor='end'>{:.6g}</text>\n",
        kLeft, y.at(tick), kWidth - kRight, kLeft - 8, y.at(tick) + 4, tick);
  }
  for (const double tick : x.ticks()) {
    text += fmt::format("<text x='{:.1f}' y='{}' text-anchor='middle'>{:.6g}</text>\n", x.at(tick),
                        kHeight - kBottom + 20, tick);
  }
  return text + fmt::format("<text x='{}' y='{}' text-anchor='middle'>step</text>\n",
                            (kLeft + kWidth - kRight) / 2, kHeight - 8);
}

}  // namespace

void plot_losses(const std::filesystem::path& log, const std::filesystem::path& picture) {
  const std::vector<Point> points = read_points(log);
  if (points.empty()) return;
  const auto by_loss = [](const Point& a, const Point& b) { return a.loss < b.loss; };
  const auto [lowest, highest] = std::minmax_element(points.begin(), points.end(), by_loss);
  const double margin = std::max(0.05 * (highest->loss - lowest->loss), 1e-3);
  const Axis x{points.front().step - 0.5, points.back().step + 0.5, kLeft, kWidth - kRight};
  const Axis y{lowest->loss - margin, highest->loss + margin, kHeight - kBottom, kTop};
  const std::vector<Point> mean = smoothed(points);

  const std::string shading = shades(points, x);
  const std::string svg =
      fmt::format(
          "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {} {}' font-family='sans-serif' "
          "font-size='12'>\n<rect width='100%' height='100%' fill='white'/>\n",
          kWidth, kHeight) +
      shading + axes(x, y) + path_of(points, x, y, "stroke='#9ec5e8'") +
      path_of(mean, x, y, "stroke='#1f5f99' stroke-width='2'") +
      fmt::format(
          "<text x='{}' y='24' font-size='15'>loss: running mean {:.4f} at step {:.0f}{}</text>\n</svg>\n",
          kLeft, mean.back().loss, mean.back().step, shading.empty() ? "" : "; shaded: full attention");
  llm::write_file(picture, svg);
}

}  // namespace moba::app
