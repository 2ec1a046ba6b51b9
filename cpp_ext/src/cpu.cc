#include "cpu.h"

#include <sys/utsname.h>

namespace edge_lora {

std::string CpuFeatures() {
  utsname name = {};
  std::string text = uname(&name) == 0 ? name.machine : "unknown";
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) text += " avx2";
  if (__builtin_cpu_supports("avx512f")) text += " avx512f";
#endif
  return text;
}

}  // namespace edge_lora
