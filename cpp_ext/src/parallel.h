// A loop over independent items on a few threads.
#pragma once

#include <cstddef>
#include <functional>

namespace edge_lora {

void RunParallel(size_t count, int threads, const std::function<void(size_t)>& work);

/// Calls work(0) … work(count - 1), each once, on at most `threads` threads, this one among them.
/// The first exception stops the loop (items under way finish) and is thrown here. Throws nothing
/// else: where no thread or memory for one is to be had, this thread does the work.
template <typename Work>
void ParallelFor(size_t count, int threads, const Work& work) {
  RunParallel(count, threads, std::cref(work));  // a function of a reference takes no memory
}

}  // namespace edge_lora
