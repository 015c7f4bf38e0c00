#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace moba::app {

struct Colour {
  double red, green, blue;
};

inline constexpr Colour kInk{0.14, 0.16, 0.18}, kMuted{0.43, 0.47, 0.51}, kFaint{0.87, 0.89, 0.91};

/// `share` of the way from red (0) over yellow to green (1).
Colour red_to_green(double share);

struct Point {
  double x, y;
};

enum class Align : std::uint8_t { left, centre, right };

/// A drawing on white that becomes a PNG file, two pixels to a unit.
class Picture {
 public:
  Picture(double width, double height);
  ~Picture();
  Picture(const Picture&) = delete;
  Picture& operator=(const Picture&) = delete;

  void fill(Point corner, double width, double height, const Colour& colour);
  void line(const std::vector<Point>& points, const Colour& colour, double width);
  /// `at` is on the baseline of the text.
  void text(Point at, const std::string& words, double size, Align align = Align::left,
            const Colour& colour = kInk);
  /// Throws DataError.
  void save(const std::filesystem::path& path) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moba::app
