#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "app/plot/picture.h"

namespace moba::app {

/// Shares from 0 to 1 in rows and columns, an unknown one left blank.
struct Heatmap {
  std::string title;
  std::vector<std::string> rows, columns;
  std::vector<std::vector<std::optional<double>>> values;  // [rows][columns]
};

/// Heatmaps side by side, red (0) over yellow to green (1), every cell with its percentage. Throws DataError.
void draw_heatmaps(const std::filesystem::path& png, const std::string& title,
                   const std::vector<Heatmap>& maps, const std::string& row_label,
                   const std::string& column_label);

/// One line of a plot.
struct Curve {
  std::string name;
  std::vector<Point> points;
};

/// Curves over a common axis, with a legend. Curves without points are left out. Throws DataError.
void draw_curves(const std::filesystem::path& png, const std::string& title, const std::vector<Curve>& curves,
                 const std::string& x_label);

}  // namespace moba::app
