#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "llm/config.h"

namespace moba::llm {

using VisitTensor = std::function<void(const std::string& name, const std::vector<std::int64_t>& shape)>;

/// Calls `visit` for every tensor of a model of this shape, by its Hugging Face name.
void for_each_tensor(const ModelConfig& config, const VisitTensor& visit);

/// Returns the GGUF name of a Hugging Face tensor, or the name itself if it has no other.
std::string gguf_name(std::string_view hugging_face_name);

}  // namespace moba::llm
