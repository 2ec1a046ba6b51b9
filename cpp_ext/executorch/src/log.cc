#include "log.h"

#include <executorch/runtime/platform/platform.h>

#include <mutex>
#include <string_view>
#include <utility>

#include "status.h"

namespace edge_lora {
namespace {

// A damaged program can make it complain about every tensor.
constexpr size_t kMaxKept = 2000;

thread_local LogScope* current = nullptr;
thread_local std::string kept;
pal_emit_log_message_method emit_elsewhere = nullptr;
pal_abort_method abort_elsewhere = nullptr;

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

/// The engine's frames are left without their destructors being run: memory leaks, and that is
/// better than the end of the caller's process.
void Abort() {
  if (current == nullptr) abort_elsewhere();
  throw Error(Code::kInternal, "ExecuTorch gave up: " + kept);
}

/// Messages of other users of the engine go where they went before. Such a user, loaded later, may
/// have put its own functions in the place of ours.
void Register() {
  static std::mutex mutex;
  const std::scoped_lock lock(mutex);
  executorch::runtime::PalImpl ours = *executorch::runtime::get_pal_impl();
  if (ours.emit_log_message == &Emit && ours.abort == &Abort) return;
  emit_elsewhere = std::exchange(ours.emit_log_message, &Emit);
  abort_elsewhere = std::exchange(ours.abort, &Abort);
  ours.source_filename = "edge_lora";
  static_cast<void>(executorch::runtime::register_pal(ours));
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
