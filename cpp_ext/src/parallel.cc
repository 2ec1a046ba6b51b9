#include "parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace edge_lora {

void RunParallel(size_t count, int threads, const std::function<void(size_t)>& work) {
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto drain = [&] {
    try {
      for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) work(i);
    } catch (...) {
      next = count;
      const std::scoped_lock hold(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::jthread> helpers;
  try {
    for (int t = 1; t < threads && std::cmp_less(t, count); ++t) helpers.emplace_back(drain);
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
    // No more threads or memory to be had: those that started and this one do the work.
  }
  drain();
  helpers.clear();  // joins
  if (failure) std::rethrow_exception(failure);
}

}  // namespace edge_lora
