// JSON from a stranger: no duplicate keys, bounded depth, and typed access that names what is
// wrong.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace edge_lora {

using Json = nlohmann::json;

/// Parses one JSON text. Throws Error(kAdapterFile) if it is not JSON, nests deeper than 64, or
/// has an object with a duplicate key.
Json ParseStrict(std::string_view text);

/// Typed members of an object. Each throws Error(kAdapterFile) that names the key.
const Json& Member(const Json& object, const char* key);
const Json& ObjectIn(const Json& object, const char* key);
const Json& ArrayIn(const Json& object, const char* key);
std::string TextIn(const Json& object, const char* key);
double NumberIn(const Json& object, const char* key);
int64_t IntegerIn(const Json& object, const char* key);

/// A non-negative integer. Throws Error(kAdapterFile) that names `what`.
uint64_t Natural(const Json& value, const std::string& what);

}  // namespace edge_lora
