#include "app/charts.h"

#include <fmt/format.h>

#include <algorithm>

#include "app/picture.h"

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

}  // namespace moba::app
