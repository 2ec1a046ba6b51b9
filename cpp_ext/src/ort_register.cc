// Registers our allocator with ONNX Runtime.
//
// `SessionOptions.register_custom_ops_library(<path of this library>)` calls RegisterCustomOps and
// so hands over the C API of the engine that is already in the process; no header, no linking. The
// engine's tables only ever grow, so an entry is known by its position. Sessions opt in with
// `session.use_env_allocators`; all others are left alone.
#include <cstdint>
#include <mutex>
#include <new>
#include <string>

#include "allocator.h"

namespace edge_lora {
namespace {

struct OrtApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

/// Positions in OrtApi.
enum Entry : uint8_t {
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kCreateMemoryInfo = 68,
  kReleaseStatus = 93,
  kRegisterAllocator = 176,
};

struct OrtAllocator {
  uint32_t version;
  void* (*Alloc)(OrtAllocator*, size_t);
  void (*Free)(OrtAllocator*, void*);
  const void* (*Info)(const OrtAllocator*);
  void* (*Reserve)(OrtAllocator*, size_t);  // since 1.18: memory that lives as long as a session
  void* unused[3];                          // later versions look here: null means absent
};

// The oldest engine that has all of the above; newer ones hand out this version's table too.
constexpr uint32_t kApiVersion = 23;
constexpr int kWarning = 2;

struct Registration {
  std::mutex mutex;
  std::string status = "not registered";
  void* memory_info = nullptr;
};

Registration& TheRegistration() {
  static Registration& registration = *new Registration;  // leaked, like the allocator's state
  return registration;
}

// What the engine calls; nothing may be thrown through it.
void* Allocate(size_t bytes, bool reserved) noexcept {
  try {
    return AllocateBlock(bytes, reserved);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void* Alloc(OrtAllocator* /*self*/, size_t bytes) noexcept { return Allocate(bytes, false); }
void* Reserve(OrtAllocator* /*self*/, size_t bytes) noexcept { return Allocate(bytes, true); }
void Free(OrtAllocator* /*self*/, void* memory) noexcept { FreeBlock(memory); }
const void* Info(const OrtAllocator* /*self*/) noexcept { return TheRegistration().memory_info; }

OrtAllocator our_allocator = {kApiVersion, Alloc, Free, Info, Reserve, {}};

template <typename Function>
Function Get(const void* const* api, Entry entry) {
  return reinterpret_cast<Function>(const_cast<void*>(api[entry]));
}

/// Returns "registered" or the reason why not.
std::string Register(const OrtApiBase* base, void** memory_info) {
  const std::string version = base->GetVersionString();
  const void* const* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return "ONNX Runtime " + version + " is too old: 1." + std::to_string(kApiVersion) +
           " or newer is needed";
  }
  using Status = void*;
  const auto create_env = Get<Status (*)(int, const char*, void**)>(api, kCreateEnv);
  const auto create_memory_info =
      Get<Status (*)(const char*, int, int, int, void**)>(api, kCreateMemoryInfo);
  const auto register_allocator = Get<Status (*)(void*, OrtAllocator*)>(api, kRegisterAllocator);
  void* env = nullptr;  // the process's one environment; our reference keeps it alive for good
  Status status = create_env(kWarning, "edge_lora", &env);
  if (status == nullptr) status = create_memory_info("Cpu", 0, 0, 0, memory_info);
  if (status == nullptr) status = register_allocator(env, &our_allocator);
  if (status == nullptr) return "registered";
  const std::string reason = Get<const char* (*)(Status)>(api, kGetErrorMessage)(status);
  Get<void (*)(Status)>(api, kReleaseStatus)(status);
  return "ONNX Runtime " + version + " refused: " + reason;
}

}  // namespace

std::string AllocatorStatus() {
  Registration& registration = TheRegistration();
  const std::scoped_lock hold(registration.mutex);
  return registration.status;
}

}  // namespace edge_lora

extern "C" __attribute__((visibility("default"))) void* RegisterCustomOps(
    void* /*session_options*/, const edge_lora::OrtApiBase* base) {
  auto& registration = edge_lora::TheRegistration();
  const std::scoped_lock hold(registration.mutex);
  if (registration.status != "registered") {
    registration.status = edge_lora::Register(base, &registration.memory_info);
  }
  return nullptr;  // no custom operators; a refusal is told by AllocatorStatus
}
