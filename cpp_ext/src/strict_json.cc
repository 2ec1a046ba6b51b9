#include "strict_json.h"

#include <algorithm>
#include <limits>
#include <unordered_set>
#include <vector>

#include "status.h"

namespace edge_lora {
namespace {

constexpr size_t kMaxDepth = 64;

[[noreturn]] void Refuse(const std::string& reason) { throw Error(Code::kAdapterFile, reason); }

/// Reads a text once to see what the tree no longer shows: duplicate keys and depth.
///
/// The library's own hook for this, a callback of parse(), takes quadratic time on wide objects.
class Inspector : public nlohmann::json_sax<Json> {
 public:
  bool null() override { return true; }
  bool boolean(bool /*value*/) override { return true; }
  bool number_integer(int64_t /*value*/) override { return true; }
  bool number_unsigned(uint64_t /*value*/) override { return true; }
  bool number_float(double /*value*/, const std::string& /*text*/) override { return true; }
  bool string(std::string& /*value*/) override { return true; }
  bool binary(Json::binary_t& /*value*/) override { return true; }
  bool start_object(size_t /*size*/) override { return Open(); }
  bool end_object() override { return Close(); }
  bool start_array(size_t /*size*/) override { return Open(); }
  bool end_array() override { return Close(); }
  bool key(std::string& name) override {
    if (!keys_.back().insert(std::move(name)).second) Refuse("duplicate keys in the header");
    return true;
  }
  bool parse_error(size_t /*at*/, const std::string& /*token*/,
                   const Json::exception& error) override {
    // The parser quotes what it read, which need not be text.
    std::string reason = error.what();
    std::ranges::replace_if(reason, [](char c) { return c < ' ' || c > '~'; }, '?');
    Refuse("not JSON: " + reason);
  }

 private:
  bool Open() {
    if (keys_.size() == kMaxDepth) Refuse("the header nests too deep");
    keys_.emplace_back();
    return true;
  }
  bool Close() {
    keys_.pop_back();
    return true;
  }

  std::vector<std::unordered_set<std::string>> keys_;  // of the objects (and arrays) that are open
};

}  // namespace

Json ParseStrict(std::string_view text) {
  if (text.starts_with("\xef\xbb\xbf")) Refuse("the header starts with a byte order mark");
  // The parser would take a zero byte for the end and not look behind it.
  if (text.find('\0') != std::string_view::npos) Refuse("the header holds a zero byte");
  Inspector inspector;
  Json::sax_parse(text.begin(), text.end(), &inspector);
  return Json::parse(text.begin(), text.end());
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
