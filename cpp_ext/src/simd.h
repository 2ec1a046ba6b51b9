// Sixteen floats at a time, on whatever vectors the CPU has.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Compiles a function once per instruction set and picks the widest at run time. The library itself
// is built for the floor of its architecture. Contraction is off everywhere, so every clone rounds
// alike and results do not depend on the CPU.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define EL_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EL_CLONES
#endif

namespace edge_lora {

/// Outputs that the kernels handle side by side: one cache line of fp32.
inline constexpr int kLine = 16;

/// A line in registers; in memory a line is kLine plain floats, aligned or not.
using Line = float __attribute__((vector_size(kLine * sizeof(float))));
using LineBits = int __attribute__((vector_size(kLine * sizeof(float))));

inline void Load(const float* from, Line& line) { std::memcpy(&line, from, sizeof line); }
inline void Store(const Line& line, float* to) { std::memcpy(to, &line, sizeof line); }

/// Stores an aligned line past the caches, where the CPU can: half the traffic of a plain store,
/// which first reads what it overwrites.
inline void Stream(const Line& line, float* to) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % sizeof line == 0) {
    float from[kLine];
    Store(line, from);
    for (int i = 0; i < kLine; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
    return;
  }
#endif
  Store(line, to);
}

inline void FinishStreams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace edge_lora
