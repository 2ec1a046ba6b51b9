// A loop over independent items on a few threads.
#pragma once

#include <cstddef>
#include <functional>

namespace edge_lora {

/// Calls work(0) … work(count - 1), each once, on at most `threads` threads, this one among them.
/// The first exception stops the loop (items under way finish) and is thrown here.
void ParallelFor(size_t count, int threads, const std::function<void(size_t)>& work);

}  // namespace edge_lora
