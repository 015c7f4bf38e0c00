#include "llm/model/load.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace moba::llm {
namespace {

/// Floats converted at a time, so that they stay in the core's cache.
constexpr std::int64_t kChunk = 65536;

/// Releases the mapped pages of a tensor that will not be read again.
void release_pages(const StoredTensor& tensor) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<std::uintptr_t>(tensor.bytes.data()) / page * page;
  const auto last = reinterpret_cast<std::uintptr_t>(tensor.bytes.data() + tensor.bytes.size());
  madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

std::int64_t rows_of(const std::vector<Loader::Part>& parts) {
  std::int64_t rows = 0;
  for (const Loader::Part& part : parts) rows += part.rows;
  return rows;
}

}  // namespace

void Loader::read_rows(const std::string& name, const at::Tensor& rows) const {
  const StoredTensor& tensor = *weights_.find(name);
  const std::int64_t count = rows.size(0), columns = rows.size(1);
  const std::int64_t step = std::max<std::int64_t>(1, kChunk / columns);
  at::parallel_for(0, (count + step - 1) / step, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scratch(static_cast<std::size_t>(step * columns));
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      const std::int64_t first = chunk * step, size = std::min(step, count - first);
      for (std::int64_t row = first, run = 0; row < first + size; row += run) {
        const std::int64_t source = weights_.stored_row(name, row);
        run = 1;
        while (row + run < first + size && weights_.stored_row(name, row + run) == source + run) ++run;
        dequantise(tensor, source, run, scratch.data() + (row - first) * columns);
      }
      rows.narrow(0, first, size).copy_(at::from_blob(scratch.data(), {size, columns}, at::kFloat));
    }
  });
  release_pages(tensor);
}

at::Tensor Loader::matrix(const std::vector<Part>& parts, std::int64_t columns) const {
  at::Tensor matrix = at::empty({rows_of(parts), columns}, dtype_);
  std::int64_t row = 0;
  for (const Part& part : parts) {
    read_rows(part.name, matrix.narrow(0, row, part.rows));
    row += part.rows;
  }
  return matrix;
}

void Loader::read_vector(const std::string& name, const at::Tensor& out) const {
  std::vector<float> values(static_cast<std::size_t>(out.size(0))), ordered(values.size());
  dequantise(*weights_.find(name), 0, 1, values.data());
  for (std::size_t i = 0; i < values.size(); ++i) {
    ordered[i] = values[static_cast<std::size_t>(weights_.stored_row(name, static_cast<std::int64_t>(i)))];
  }
  out.copy_(at::from_blob(ordered.data(), {out.size(0)}, at::kFloat));
}

at::Tensor Loader::bias(const std::vector<Part>& parts) const {
  at::Tensor bias = at::empty({rows_of(parts)}, dtype_);
  std::int64_t row = 0;
  for (const Part& part : parts) {
    read_vector(part.name, bias.narrow(0, row, part.rows));
    row += part.rows;
  }
  return bias;
}

at::Tensor Loader::norm(const std::string& name, std::int64_t size) const {
  at::Tensor norm = at::empty({size}, at::kFloat);
  read_vector(name, norm);
  return norm;
}

}  // namespace moba::llm
