#include "app/plot/picture.h"

#include <cairo.h>

#include <algorithm>
#include <array>
#include <string>

#include "llm/formats/output_file.h"

namespace moba::app {
namespace {

constexpr double kPixels = 2;

}  // namespace

struct Picture::Impl {
  std::unique_ptr<cairo_surface_t, decltype(&cairo_surface_destroy)> surface;
  std::unique_ptr<cairo_t, decltype(&cairo_destroy)> cairo;

  void use(const Colour& colour) const {
    cairo_set_source_rgb(cairo.get(), colour.red, colour.green, colour.blue);
  }
};

Colour red_to_green(double share) {
  // ColorBrewer's RdYlGn, five classes (colorbrewer2.org).
  constexpr std::array<Colour, 5> kSteps{{{0.843, 0.098, 0.110},
                                          {0.992, 0.682, 0.380},
                                          {1.000, 1.000, 0.749},
                                          {0.651, 0.851, 0.416},
                                          {0.102, 0.588, 0.255}}};
  const double at = std::clamp(share, 0.0, 1.0) * (kSteps.size() - 1);
  const auto step = std::min(static_cast<std::size_t>(at), kSteps.size() - 2);
  const double more = at - static_cast<double>(step);
  const Colour &a = kSteps[step], &b = kSteps[step + 1];
  return {a.red + more * (b.red - a.red), a.green + more * (b.green - a.green),
          a.blue + more * (b.blue - a.blue)};
}

Picture::Picture(double width, double height) {
  cairo_surface_t* surface = cairo_image_surface_create(CAIRO_FORMAT_RGB24, static_cast<int>(kPixels * width),
                                                        static_cast<int>(kPixels * height));
  impl_.reset(new Impl{{surface, cairo_surface_destroy}, {cairo_create(surface), cairo_destroy}});
  cairo_t* cairo = impl_->cairo.get();
  cairo_scale(cairo, kPixels, kPixels);
  cairo_set_line_join(cairo, CAIRO_LINE_JOIN_ROUND);
  cairo_select_font_face(cairo, "sans-serif", CAIRO_FONT_SLANT_NORMAL, CAIRO_FONT_WEIGHT_NORMAL);
  impl_->use({1, 1, 1});
  cairo_paint(cairo);
}

Picture::~Picture() = default;

void Picture::fill(Point corner, double width, double height, const Colour& colour) {
  cairo_t* cairo = impl_->cairo.get();
  impl_->use(colour);
  cairo_set_antialias(cairo, CAIRO_ANTIALIAS_NONE);  // neighbours meet without a seam
  cairo_rectangle(cairo, corner.x, corner.y, width, height);
  cairo_fill(cairo);
  cairo_set_antialias(cairo, CAIRO_ANTIALIAS_DEFAULT);
}

void Picture::line(const std::vector<Point>& points, const Colour& colour, double width) {
  cairo_t* cairo = impl_->cairo.get();
  impl_->use(colour);
  cairo_set_line_width(cairo, width);
  cairo_new_path(cairo);  // text leaves a point behind
  for (const Point& point : points) cairo_line_to(cairo, point.x, point.y);
  cairo_stroke(cairo);
}

void Picture::text(Point at, const std::string& words, double size, Align align, const Colour& colour) {
  cairo_t* cairo = impl_->cairo.get();
  impl_->use(colour);
  cairo_set_font_size(cairo, size);
  cairo_text_extents_t extents;
  cairo_text_extents(cairo, words.c_str(), &extents);
  const double share = align == Align::left ? 0 : align == Align::centre ? 0.5 : 1;
  cairo_move_to(cairo, at.x - share * extents.x_advance, at.y);
  cairo_show_text(cairo, words.c_str());
}

void Picture::save(const std::filesystem::path& path) const {
  std::string png;
  const auto keep = [](void* to, const unsigned char* bytes, unsigned int count) {
    static_cast<std::string*>(to)->append(reinterpret_cast<const char*>(bytes), count);
    return CAIRO_STATUS_SUCCESS;
  };
  cairo_surface_write_to_png_stream(impl_->surface.get(), keep, &png);
  llm::write_file(path, png);
}

}  // namespace moba::app
