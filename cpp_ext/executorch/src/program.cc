#include "program.h"

#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "log.h"
#include "status.h"

namespace edge_lora {
namespace {

namespace et = executorch::runtime;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

constexpr const char* kMethod = "forward";
constexpr const char* kDelegate = "XnnpackBackend";
constexpr size_t kAlignment = 64;  // of the memory that programs work in
// Weights are not in it, so more is a damaged program, not a large one.
constexpr uint64_t kMaxPlanned = uint64_t{1} << 36;

Code CodeOf(et::Error error) {
  switch (error) {
    case et::Error::OperatorMissing:
    case et::Error::NotFound:
    case et::Error::NotSupported:
    case et::Error::NotImplemented:
    case et::Error::DelegateInvalidCompatibility:
      return Code::kUnsupported;
    case et::Error::MemoryAllocationFailed:
    case et::Error::DelegateMemoryAllocationFailed:
    case et::Error::OutOfResources:
      return Code::kOutOfMemory;
    default:
      return Code::kBundle;
  }
}

/// "Error::InvalidProgram" and what the engine logged about it.
std::string Reason(et::Error error, const LogScope& log) {
  const std::string said = log.Errors();
  return std::string(et::to_string(error)) + (said.empty() ? "" : ": " + said);
}

void RequireLoaded(et::Error error, const char* what, const LogScope& log) {
  if (error == et::Error::Ok) return;
  const Code code = CodeOf(error);
  throw Error(code, std::string("ExecuTorch cannot load ") + what + ": " + Reason(error, log) +
                        (code == Code::kBundle ? ". The file is damaged, or is no program: export "
                                                 "it again"
                                               : ""));
}

std::string Text(const std::vector<int32_t>& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

[[noreturn]] void RefuseMemory(size_t bytes) {
  throw Error(Code::kOutOfMemory,
              "out of memory: a program asks for " + std::to_string(bytes) + " bytes at once");
}

std::unique_ptr<void, FreeMemory> Allocate(size_t bytes) {
  // aligned_alloc wants whole multiples.
  const size_t rounded = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  std::unique_ptr<void, FreeMemory> memory(std::aligned_alloc(kAlignment, rounded));
  if (memory == nullptr) RefuseMemory(bytes);
  return memory;
}

/// Gives back what was offered for the largest output, and is not needed for this one.
void Shrink(std::unique_ptr<void, FreeMemory>& memory, size_t bytes) {
  // NOLINTNEXTLINE(cppcoreguidelines-no-malloc): it was allocated for std::free.
  void* smaller = std::realloc(memory.get(), std::max(kAlignment, bytes));
  if (smaller == nullptr) return;  // then it stays as large as it is
  static_cast<void>(memory.release());
  memory.reset(smaller);
}

TensorSpec SpecOf(const et::Result<et::Tag>& tag, const et::Result<et::TensorInfo>& info,
                  const std::string& what) {
  if (!tag.ok()) throw Error(Code::kBundle, what + " of the program has no type");
  if (*tag != et::Tag::Tensor) {
    throw Error(Code::kUnsupported,
                what + " of the program is not a tensor: export it with tensors only");
  }
  if (!info.ok()) throw Error(Code::kBundle, what + " of the program is damaged");
  const auto sizes = info->sizes();
  return {info->scalar_type(), {sizes.begin(), sizes.end()}, info->nbytes()};
}

}  // namespace

std::string_view NameOf(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "";
  }
}

Program::Program(std::span<const uint8_t> pte, std::shared_ptr<const PackedFile> packed,
                 int threads)
    : pte_(pte), packed_(std::move(packed)), threads_(threads), loader_(pte.data(), pte.size()) {
  const LogScope log;
  const Threads::Scope scope(threads_);
  et::runtime_init();
  LoadProgram();
  const auto meta = program_->method_meta(kMethod);
  RequireLoaded(meta.error(), "the method 'forward' of the program", log);
  Describe(*meta);
  PlanMemory(*meta);
  LoadMethod();
}

void Program::LoadProgram() {
  const LogScope log;
  if (reinterpret_cast<uintptr_t>(pte_.data()) % 16 != 0) {
    throw Error(Code::kInvalidArgument, "a program must lie at a multiple of 16 bytes: map it");
  }
  auto program = et::Program::load(&loader_, et::Program::Verification::InternalConsistency);
  RequireLoaded(program.error(), "the program", log);
  program_ = std::make_unique<et::Program>(std::move(*program));
}

void Program::Describe(const et::MethodMeta& meta) {
  for (size_t i = 0; i < meta.num_inputs(); ++i) {
    inputs_.push_back(
        SpecOf(meta.input_tag(i), meta.input_tensor_meta(i), "input " + std::to_string(i)));
  }
  for (size_t i = 0; i < meta.num_outputs(); ++i) {
    const auto info = meta.output_tensor_meta(i);
    outputs_.push_back(SpecOf(meta.output_tag(i), info, "output " + std::to_string(i)));
    is_planned_.push_back(info->is_memory_planned());
  }
}

void Program::PlanMemory(const et::MethodMeta& meta) {
  uint64_t total = 0;
  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
    const auto bytes = meta.memory_planned_buffer_size(i);
    const uint64_t size = bytes.ok() && *bytes >= 0 ? static_cast<uint64_t>(*bytes) : kMaxPlanned;
    total += size;
    if (size >= kMaxPlanned || total >= kMaxPlanned) {
      throw Error(Code::kBundle, "the program asks for an impossible amount of memory");
    }
    // Zeros: mutable buffers without a value start so. Pages that are not touched cost nothing.
    size_t room = size + kAlignment;
    std::unique_ptr<void, FreeMemory> memory(std::calloc(1, room));
    if (memory == nullptr) RefuseMemory(size);
    void* aligned = memory.get();
    std::align(kAlignment, size, aligned, room);
    planned_spans_.emplace_back(static_cast<uint8_t*>(aligned), size);
    planned_.push_back(std::move(memory));
  }
  planned_memory_ = std::make_unique<et::HierarchicalAllocator>(
      et::Span<et::Span<uint8_t>>(planned_spans_.data(), planned_spans_.size()));
  memory_ = std::make_unique<et::MemoryManager>(&method_memory_, planned_memory_.get(),
                                                &temporary_memory_);
}

void Program::LoadMethod() {
  const LogScope log;
  et::BackendOptions<2> options;
  et::LoadBackendOptionsMap options_of;
  if (packed_ != nullptr) {
    const std::string path = packed_->path();
    if (options.set_option("weight_cache_enabled", true) != et::Error::Ok ||
        options.set_option("packed_cache_path", path.c_str()) != et::Error::Ok ||
        options_of.set_options(kDelegate, options.view()) != et::Error::Ok) {
      throw Error(Code::kInternal, "ExecuTorch takes no options for " + std::string(kDelegate));
    }
  } else if (options.set_option("weight_cache_enabled", false) != et::Error::Ok ||
             options_of.set_options(kDelegate, options.view()) != et::Error::Ok) {
    throw Error(Code::kInternal, "ExecuTorch takes no options for " + std::string(kDelegate));
  }
  auto method = program_->load_method(kMethod, memory_.get(), nullptr, nullptr, &options_of);
  RequireLoaded(method.error(), "the method 'forward' of the program", log);
  method_ = std::make_unique<et::Method>(std::move(*method));
}

void Program::RequireFitting(const std::vector<InputTensor>& inputs) const {
  std::vector<std::string> problems;
  if (inputs.size() != inputs_.size()) {
    problems.push_back(std::to_string(inputs.size()) + " inputs are given, the program takes " +
                       std::to_string(inputs_.size()));
  }
  for (size_t i = 0; i < std::min(inputs.size(), inputs_.size()); ++i) {
    const std::string name = "input " + std::to_string(i);
    const TensorSpec& spec = inputs_[i];
    if (inputs[i].type != spec.type) {
      problems.push_back(name + " is " + std::string(NameOf(inputs[i].type)) +
                         ", the program takes " + std::string(NameOf(spec.type)));
    }
    if (inputs[i].sizes.size() != spec.sizes.size() ||
        !std::ranges::equal(inputs[i].sizes, spec.sizes, std::ranges::less_equal())) {
      problems.push_back(name + " has shape " + Text(inputs[i].sizes) +
                         ", the program takes at most " + Text(spec.sizes));
    }
  }
  if (!problems.empty()) {
    throw Error(Code::kInvalidArgument, ListAll("the inputs do not fit the program", problems));
  }
}

void Program::SetInputs(const std::vector<InputTensor>& inputs) {
  const LogScope log;
  std::array<uint8_t, 64> order = {};
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint8_t>(i);
  for (size_t i = 0; i < inputs.size(); ++i) {
    std::vector<int32_t> sizes = inputs[i].sizes;
    std::vector<int32_t> strides(sizes.size());
    for (size_t d = sizes.size(), step = 1; d-- > 0;) {
      strides[d] = static_cast<int32_t>(step);
      step *= static_cast<size_t>(sizes[d]);
    }
    TensorImpl tensor(inputs[i].type, static_cast<ssize_t>(sizes.size()), sizes.data(),
                      const_cast<void*>(inputs[i].data),  // NOLINT: inputs are only read
                      order.data(), strides.data());
    const et::Error error = method_->set_input(et::EValue(Tensor(&tensor)), i);
    if (error != et::Error::Ok) {
      throw Error(Code::kInvalidArgument, "the program refuses input " + std::to_string(i) +
                                              " of shape " + Text(sizes) +
                                              " (the most it takes is " + Text(inputs_[i].sizes) +
                                              "): " + Reason(error, log));
    }
  }
}

std::vector<OutputTensor> Program::OfferOutputs() {
  const LogScope log;
  std::vector<OutputTensor> outputs(outputs_.size());
  for (size_t i = 0; i < outputs_.size(); ++i) {
    if (is_planned_[i]) continue;
    outputs[i].data = Allocate(outputs_[i].bytes);
    // An output that is an input or a constant has its place already: it is copied, too.
    if (method_->set_output_data_ptr(outputs[i].data.get(), outputs_[i].bytes, i) !=
        et::Error::Ok) {
      is_planned_[i] = true;
      outputs[i].data.reset();
    }
  }
  return outputs;
}

void Program::Collect(size_t position, OutputTensor& output) {
  const et::EValue& value = method_->get_output(position);
  if (!value.isTensor()) {
    throw Error(Code::kInternal, "output " + std::to_string(position) + " is not a tensor");
  }
  const Tensor& tensor = value.toTensor();
  output.type = tensor.scalar_type();
  output.sizes.assign(tensor.sizes().begin(), tensor.sizes().end());
  output.strides.assign(tensor.strides().begin(), tensor.strides().end());
  if (output.data != nullptr && tensor.const_data_ptr() == output.data.get()) {
    Shrink(output.data, tensor.nbytes());
    return;
  }
  output.data = Allocate(tensor.nbytes());
  if (tensor.nbytes() > 0) std::memcpy(output.data.get(), tensor.const_data_ptr(), tensor.nbytes());
}

std::vector<OutputTensor> Program::Run(const std::vector<InputTensor>& inputs) {
  RequireFitting(inputs);
  const std::scoped_lock lock(mutex_);
  if (is_broken_) {
    throw Error(Code::kInternal, "ExecuTorch gave up in an earlier run: open the program again");
  }
  const LogScope log;
  const Threads::Scope scope(threads_);
  // Inputs last: one that is an output, too, must not lose its place to that.
  std::vector<OutputTensor> outputs = OfferOutputs();
  SetInputs(inputs);
  is_broken_ = true;  // unless execute returns
  const et::Error error = method_->execute();
  is_broken_ = false;
  if (error != et::Error::Ok) {
    throw Error(Code::kInternal, "ExecuTorch failed to run the program: " + Reason(error, log));
  }
  for (size_t i = 0; i < outputs.size(); ++i) Collect(i, outputs[i]);
  return outputs;
}

}  // namespace edge_lora
