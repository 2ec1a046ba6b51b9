#include "threads.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "log.h"
#include "status.h"

// Not among the headers of the wheel; the library exports it. Only these calls are made, and
// never an object of it.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  // NOLINTBEGIN(readability-identifier-naming): their names.
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t num_threads);
  // NOLINTEND(readability-identifier-naming)
};
// NOLINTNEXTLINE(readability-identifier-naming)
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace edge_lora {
namespace {

constexpr int kMaxThreads = 1024;

std::mutex pool_mutex;
int pool_users = 0;  // programs of several threads

}  // namespace

Threads::Threads(int count) : count_(count) {
  if (count < 1 || count > kMaxThreads) {
    throw Error(Code::kInvalidArgument,
                "threads is " + std::to_string(count) + ", must be 1 to 1024");
  }
  if (count == 1) return;
  const LogScope log;
  const std::scoped_lock lock(pool_mutex);
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool == nullptr) throw Error(Code::kInternal, "ExecuTorch has no thread pool");
  const size_t now = pool->get_thread_count();
  if (std::cmp_not_equal(now, count)) {
    if (pool_users > 0) {
      throw Error(Code::kInvalidArgument,
                  "threads is " + std::to_string(count) + ", but programs with " +
                      std::to_string(now) +
                      " threads are open, and ExecuTorch has one pool per process: close them, or "
                      "use " +
                      std::to_string(now) + " threads, or 1");
    }
    if (!pool->_unsafe_reset_threadpool(static_cast<uint32_t>(count))) {
      throw Error(Code::kInternal,
                  "ExecuTorch cannot make a pool of " + std::to_string(count) + " threads");
    }
  }
  ++pool_users;
}

Threads::~Threads() {
  if (count_ == 1) return;
  const std::scoped_lock lock(pool_mutex);
  --pool_users;
}

Threads::Scope::Scope(const Threads& threads) {
  if (threads.count_ == 1) without_pool_.emplace();
}

}  // namespace edge_lora
