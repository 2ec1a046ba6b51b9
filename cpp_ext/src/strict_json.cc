#include "strict_json.h"

#include <limits>
#include <set>
#include <vector>

#include "status.h"

namespace edge_lora {
namespace {

constexpr int kMaxDepth = 64;

[[noreturn]] void Refuse(const std::string& reason) { throw Error(Code::kAdapterFile, reason); }

}  // namespace

Json ParseStrict(std::string_view text) {
  if (text.starts_with("\xef\xbb\xbf")) Refuse("the header starts with a byte order mark");
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto watch = [&keys](int depth, Json::parse_event_t event, Json& parsed) {
    switch (event) {
      case Json::parse_event_t::object_start:
        keys.emplace_back();
        [[fallthrough]];
      case Json::parse_event_t::array_start:
        if (depth >= kMaxDepth) Refuse("the header nests too deep");
        break;
      case Json::parse_event_t::object_end:
        keys.pop_back();
        break;
      case Json::parse_event_t::key:
        if (!keys.back().insert(parsed.get<std::string>()).second) {
          Refuse("duplicate keys in the header");
        }
        break;
      default:
        break;
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const Json::exception& error) {
    Refuse(std::string("not JSON: ") + error.what());
  }
}

const Json& Member(const Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) Refuse(std::string("missing '") + key + "'");
  return *found;
}

const Json& ObjectIn(const Json& object, const char* key) {
  const Json& value = Member(object, key);
  if (!value.is_object()) Refuse(std::string("'") + key + "' is not an object");
  return value;
}

const Json& ArrayIn(const Json& object, const char* key) {
  const Json& value = Member(object, key);
  if (!value.is_array()) Refuse(std::string("'") + key + "' is not an array");
  return value;
}

std::string TextIn(const Json& object, const char* key) {
  const Json& value = Member(object, key);
  if (!value.is_string()) Refuse(std::string("'") + key + "' is not a string");
  return value.get<std::string>();
}

double NumberIn(const Json& object, const char* key) {
  const Json& value = Member(object, key);
  if (!value.is_number()) Refuse(std::string("'") + key + "' is not a number");
  return value.get<double>();
}

int64_t IntegerIn(const Json& object, const char* key) {
  const uint64_t value = Natural(Member(object, key), key);
  if (value > std::numeric_limits<int64_t>::max()) Refuse(std::string("'") + key + "' is too big");
  return static_cast<int64_t>(value);
}

uint64_t Natural(const Json& value, const std::string& what) {
  if (!value.is_number_unsigned()) Refuse("'" + what + "' is not a whole number");
  return value.get<uint64_t>();
}

}  // namespace edge_lora
