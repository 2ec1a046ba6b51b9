// What ExecuTorch says about a failure, for our own messages.
#pragma once

#include <string>

namespace edge_lora {

/// While it lives, what ExecuTorch logs on this thread is kept instead of printed, and where
/// ExecuTorch would end the process, on this thread, it throws Error(kInternal) instead: of the
/// program that it was busy with nothing may be used any more.
class LogScope {
 public:
  LogScope();
  ~LogScope();
  LogScope(const LogScope&) = delete;
  LogScope& operator=(const LogScope&) = delete;

  /// Its error messages so far, in order; empty if there are none.
  std::string Errors() const;

 private:
  LogScope* outer_;
};

}  // namespace edge_lora
