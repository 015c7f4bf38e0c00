#include "app/plot/charts.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "app/plot/axis.h"

namespace moba::app {
namespace {

constexpr double kTop = 72, kBottom = 62, kGap = 28, kRight = 24;
constexpr double kCellWidth = 46, kCellHeight = 26;

double label_width(const std::vector<std::string>& labels) {
  std::size_t longest = 0;
  for (const std::string& label : labels) longest = std::max(longest, label.size());
  return 7.2 * static_cast<double>(longest);
}

void draw_cells(Picture& picture, const Heatmap& map, double left) {
  for (std::size_t r = 0; r < map.values.size(); ++r) {
    for (std::size_t c = 0; c < map.values[r].size(); ++c) {
      const std::optional<double>& value = map.values[r][c];
      const Point corner{left + kCellWidth * static_cast<double>(c),
                         kTop + kCellHeight * static_cast<double>(r)};
      picture.fill(corner, kCellWidth - 1, kCellHeight - 1, value ? red_to_green(*value) : kFaint);
      if (!value) continue;
      const bool is_dark = *value < 0.12 || *value > 0.9;
      picture.text({corner.x + kCellWidth / 2, corner.y + kCellHeight / 2 + 4},
                   fmt::format("{:.0f}", 100 * *value), 11, Align::centre, is_dark ? Colour{1, 1, 1} : kInk);
    }
  }
}

}  // namespace

void draw_heatmaps(const std::filesystem::path& png, const std::string& title,
                   const std::vector<Heatmap>& maps, const std::string& row_label,
                   const std::string& column_label) {
  const Heatmap& first = maps.front();
  const double left = 24 + std::max(label_width(first.rows), label_width({row_label}));
  const double map_width = kCellWidth * static_cast<double>(first.columns.size());
  const double map_height = kCellHeight * static_cast<double>(first.rows.size());
  double panel_width = map_width;
  for (const Heatmap& map : maps) panel_width = std::max(panel_width, label_width({map.title}));
  const double maps_width = static_cast<double>(maps.size()) * (panel_width + kGap) - kGap;
  Picture picture(left + std::max(maps_width, label_width({title})) + kRight, kTop + map_height + kBottom);

  picture.text({left, 26}, title, 14);
  picture.text({left - 10, kTop - 10}, row_label, 11, Align::right, kMuted);
  for (std::size_t r = 0; r < first.rows.size(); ++r) {
    const double middle = kTop + kCellHeight * (static_cast<double>(r) + 0.5);
    picture.text({left - 10, middle + 4}, first.rows[r], 11, Align::right);
  }
  for (std::size_t m = 0; m < maps.size(); ++m) {
    const double at = left + static_cast<double>(m) * (panel_width + kGap);
    picture.text({at, kTop - 10}, maps[m].title, 12);
    draw_cells(picture, maps[m], at);
    for (std::size_t c = 0; c < first.columns.size(); ++c) {
      picture.text({at + kCellWidth * (static_cast<double>(c) + 0.5), kTop + map_height + 18},
                   first.columns[c], 11, Align::centre);
    }
    picture.text({at + map_width / 2, kTop + map_height + 38}, column_label, 11, Align::centre, kMuted);
  }
  picture.save(png);
}

void draw_curves(const std::filesystem::path& png, const std::string& title, const std::vector<Curve>& curves,
                 const std::string& x_label) {
  constexpr double kWidth = 720, kHeight = 420, kLeft = 66;
  constexpr std::array<Colour, 3> kColours{{{0.12, 0.37, 0.60}, {0.84, 0.37, 0.05}, {0.35, 0.55, 0.20}}};
  Picture picture(kWidth, kHeight);
  picture.text({kLeft, 26}, title, 14);
  std::vector<Point> all;
  for (const Curve& curve : curves) all.insert(all.end(), curve.points.begin(), curve.points.end());
  if (!all.empty()) {
    const auto by_x = [](const Point& a, const Point& b) { return a.x < b.x; };
    const auto by_y = [](const Point& a, const Point& b) { return a.y < b.y; };
    const auto [left, right] = std::minmax_element(all.begin(), all.end(), by_x);
    const auto [low, high] = std::minmax_element(all.begin(), all.end(), by_y);
    const double margin = std::max(0.05 * (high->y - low->y), 1e-3);
    const Axis x{left->x - 0.5, right->x + 0.5, kLeft, kWidth - kRight};
    const Axis y{low->y - margin, high->y + margin, kHeight - kBottom, kTop};
    for (const double tick : y.ticks()) {
      picture.line({{kLeft, y.at(tick)}, {kWidth - kRight, y.at(tick)}}, kFaint, 1);
      picture.text({kLeft - 8, y.at(tick) + 4}, fmt::format("{:.6g}", tick), 11, Align::right);
    }
    for (const double tick : x.ticks())
      picture.text({x.at(tick), kHeight - kBottom + 18}, fmt::format("{:.6g}", tick), 11, Align::centre);
    double legend = kLeft;
    for (std::size_t c = 0; c < curves.size(); ++c) {
      const Colour& colour = kColours[c % kColours.size()];
      std::vector<Point> places;
      for (const Point& point : curves[c].points) places.push_back({x.at(point.x), y.at(point.y)});
      picture.line(places, colour, 2);
      picture.fill({legend, 42}, 18, 4, colour);
      picture.text({legend + 24, 48}, curves[c].name, 12);
      legend += 24 + label_width({curves[c].name}) + kGap;
    }
  }
  picture.text({(kLeft + kWidth - kRight) / 2, kHeight - 14}, x_label, 11, Align::centre, kMuted);
  picture.save(png);
}

}  // namespace moba::app
