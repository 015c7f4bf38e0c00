#include "app/bench/row.h"

namespace moba::bench {

const char* name_of(Pass pass) {
  switch (pass) {
    case Pass::forward:
      return "forward";
    case Pass::backward:
      return "backward";
    case Pass::gate:
      return "gate";
    case Pass::decode:
      return "decode";
  }
  return "?";
}

const char* name_of(Pattern pattern) {
  switch (pattern) {
    case Pattern::independent:
      return "independent";
    case Pattern::clustered:
      return "clustered";
    case Pattern::sink:
      return "sink";
  }
  return "?";
}

std::string Row::ceiling() const {
  if (setting.pass == Pass::decode) return "read_bandwidth";
  return ceilings.bf16_gflops > 0 ? ceilings.bf16_name : "fma_f32";
}

double Row::fraction_of_peak() const {
  const std::string name = ceiling();
  if (name == "read_bandwidth") return work.read_bytes / median() / 1e9 / ceilings.read_gb_per_s;
  return gflops() / (name == "fma_f32" ? ceilings.fma_gflops : ceilings.bf16_gflops);
}

}  // namespace moba::bench
