// In place of libmoba, of which the readers need this alone.
#include "moba/attention.h"

namespace moba {

std::string cpu_target() {
  return {};
}

}  // namespace moba
