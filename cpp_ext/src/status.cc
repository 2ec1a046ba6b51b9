#include "status.h"

#include <cerrno>
#include <system_error>

namespace edge_lora {

std::string ListAll(const std::string& title, const std::vector<std::string>& problems) {
  constexpr size_t kSpeltOut = 20;
  std::string text = title + ":";
  for (size_t i = 0; i < problems.size() && i < kSpeltOut; ++i) text += "\n  " + problems[i];
  if (problems.size() > kSpeltOut) {
    text += "\n  … and " + std::to_string(problems.size() - kSpeltOut) + " more";
  }
  return text;
}

std::string ErrnoMessage(const std::string& what, const std::string& path) {
  const std::string reason = std::generic_category().message(errno);
  return "cannot " + what + " '" + path + "': " + reason;
}

}  // namespace edge_lora
