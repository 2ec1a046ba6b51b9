// What can go wrong: one exception type, whose code becomes an el_status at the C border.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace edge_lora {

/// Values equal el_status in edge_lora.h.
enum class Code : int {
  kOk = 0,
  kAdapterFile = 1,
  kAdapterMismatch = 2,
  kUnsupported = 3,
  kBundle = 4,
  kInvalidArgument = 5,
  kInputOutput = 6,
  kOutOfMemory = 7,
  kInternal = 8,
};

class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message) : std::runtime_error(message), code_(code) {}
  Code code() const { return code_; }

 private:
  Code code_;
};

/// One message that lists every problem on a line of its own (twin of errors.list_all).
std::string ListAll(const std::string& title, const std::vector<std::string>& problems);

/// "cannot <what> '<path>': <reason of errno>".
std::string ErrnoMessage(const std::string& what, const std::string& path);

}  // namespace edge_lora
