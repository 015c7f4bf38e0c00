#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "app/serve/engine_thread.h"
#include "app/serve/http.h"
#include "app/serve/openai_request.h"
#include "app/serve/served_model.h"

namespace moba::app {

/// Starts the answers to a request. Throws HttpError: 429 if the queue is full, 503 if the engine has
/// stopped. `engine` and `model` must outlive the response.
std::unique_ptr<PendingResponse> start_completion(CompletionRequest request, const ServedModel& model,
                                                  EngineThread& engine);

}  // namespace moba::app
