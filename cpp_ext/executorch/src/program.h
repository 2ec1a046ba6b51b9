// One ExecuTorch program, loaded from memory and ready to run.
#pragma once

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/program.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "packed_file.h"
#include "threads.h"

namespace edge_lora {

using executorch::aten::ScalarType;

/// What the program takes or gives at one position. Sizes are the largest ones.
struct TensorSpec {
  ScalarType type = ScalarType::Undefined;
  std::vector<int32_t> sizes;
  size_t bytes = 0;
};

/// A tensor of the caller's: contiguous, in row-major order.
struct InputTensor {
  ScalarType type = ScalarType::Undefined;
  std::vector<int32_t> sizes;
  const void* data = nullptr;
};

struct FreeMemory {
  // NOLINTNEXTLINE(cppcoreguidelines-owning-memory): this is what owns it.
  void operator()(void* memory) const { std::free(memory); }
};

/// A tensor that the caller owns from now on. Strides count elements.
struct OutputTensor {
  ScalarType type = ScalarType::Undefined;
  std::vector<int32_t> sizes;
  std::vector<int32_t> strides;
  std::unique_ptr<void, FreeMemory> data;
};

/// "float32" and so on, as NumPy calls it, or "" for a type that NumPy does not have.
std::string_view NameOf(ScalarType type);

/// The method "forward" of a program. Safe to call from many threads; runs take turns.
class Program {
 public:
  /// `pte` stays the caller's, must outlive the program, and is read in place: operators that are
  /// not delegated see what is written there later. With `packed`, XNNPACK packs its weights into
  /// that file, or takes from it what is there already.
  /// Throws Error(kBundle) for a damaged program, Error(kUnsupported) for one that needs what is
  /// not here. ExecuTorch checks its own part of a program, but XNNPACK believes the graphs that
  /// are handed to it: damage in there can end the process, so compare a digest of the file first.
  Program(std::span<const uint8_t> pte, std::shared_ptr<const PackedFile> packed, int threads);
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const std::vector<TensorSpec>& inputs() const { return inputs_; }
  const std::vector<TensorSpec>& outputs() const { return outputs_; }
  const PackedFile* packed() const { return packed_.get(); }

  /// Throws Error(kInvalidArgument) with everything that is wrong with the inputs.
  std::vector<OutputTensor> Run(const std::vector<InputTensor>& inputs);

 private:
  void LoadProgram();
  void Describe(const executorch::runtime::MethodMeta& meta);
  void PlanMemory(const executorch::runtime::MethodMeta& meta);
  void LoadMethod();
  void RequireFitting(const std::vector<InputTensor>& inputs) const;
  void SetInputs(const std::vector<InputTensor>& inputs);
  std::vector<OutputTensor> OfferOutputs();
  void Collect(size_t position, OutputTensor& output);

  // In the order of making: what is below uses what is above.
  std::span<const uint8_t> pte_;
  std::shared_ptr<const PackedFile> packed_;
  Threads threads_;
  executorch::extension::BufferDataLoader loader_;
  std::unique_ptr<executorch::runtime::Program> program_;
  std::vector<TensorSpec> inputs_;
  std::vector<TensorSpec> outputs_;
  std::vector<bool> is_planned_;  ///< Per output: it lies in the program's own memory.
  std::vector<std::unique_ptr<void, FreeMemory>> planned_;
  std::vector<executorch::runtime::Span<uint8_t>> planned_spans_;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> planned_memory_;
  executorch::extension::MallocMemoryAllocator method_memory_;
  executorch::extension::MallocMemoryAllocator temporary_memory_;
  std::unique_ptr<executorch::runtime::MemoryManager> memory_;
  std::unique_ptr<executorch::runtime::Method> method_;
  bool is_broken_ = false;  ///< The engine would have ended the process in the middle of a run.
  std::mutex mutex_;
};

}  // namespace edge_lora
