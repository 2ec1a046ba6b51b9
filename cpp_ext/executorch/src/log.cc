#include "log.h"

#include <executorch/runtime/platform/platform.h>

#include <string_view>

namespace edge_lora {
namespace {

// A damaged program can make it complain about every tensor.
constexpr size_t kMaxKept = 2000;

thread_local LogScope* current = nullptr;
thread_local std::string kept;
pal_emit_log_message_method emit_elsewhere = nullptr;

void Emit(et_timestamp_t timestamp, et_pal_log_level_t level, const char* filename,
          const char* function, size_t line, const char* message, size_t length) {
  if (current == nullptr) {
    emit_elsewhere(timestamp, level, filename, function, line, message, length);
    return;
  }
  if (level != kError && level != kFatal) return;
  const std::string_view text(message, length);
  if (text.empty() || kept.size() + text.size() > kMaxKept) return;
  if (!kept.empty()) kept += "; ";
  kept += text;
}

/// Once per process: messages of other users of the engine go where they went before.
void Register() {
  static const bool is_registered = [] {
    emit_elsewhere = executorch::runtime::get_pal_impl()->emit_log_message;
    return executorch::runtime::register_pal(
        executorch::runtime::PalImpl::create(&Emit, "edge_lora"));
  }();
  static_cast<void>(is_registered);
}

}  // namespace

LogScope::LogScope() : outer_(current) {
  Register();
  if (outer_ == nullptr) kept.clear();
  current = this;
}

LogScope::~LogScope() { current = outer_; }

std::string LogScope::Errors() const { return kept; }

}  // namespace edge_lora
