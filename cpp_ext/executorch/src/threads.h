// How many threads a program runs on.
#pragma once

#include <executorch/extension/threadpool/threadpool_guard.h>

#include <optional>

namespace edge_lora {

/// A program's share in the process's thread pool, to be held as long as the program.
///
/// ExecuTorch has one pool per process, and XNNPACK keeps a pointer to it from the load on: the
/// pool cannot change while a program uses it. A program of one thread does not use it at all.
class Threads {
 public:
  /// Throws Error(kInvalidArgument) if programs with another number of threads, not 1, are open.
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  /// Around everything that the engine does: the load, each run.
  class Scope {
   public:
    explicit Scope(const Threads& threads);

   private:
    std::optional<executorch::extension::threadpool::NoThreadPoolGuard> without_pool_;
  };

 private:
  int count_;
};

}  // namespace edge_lora
