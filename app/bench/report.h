#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "app/bench/row.h"

namespace moba::bench {

nlohmann::ordered_json to_json(const Row& row);
/// A JSON list of rows; the same without the single runs as CSV with a header; a table to read.
std::string json_text(const std::vector<Row>& rows);
std::string csv_text(const std::vector<Row>& rows);
std::string table_text(const std::vector<Row>& rows);

}  // namespace moba::bench
