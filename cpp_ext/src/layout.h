// Where each value of a weight lies in the block that an engine made of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "forms.h"

namespace edge_lora {

/// How a weight lies on disk or in an unpacked tensor: (out, in) or (in, out), row-major.
enum class Stored : uint8_t { kOutIn = 0, kInOut = 1 };

/// A permutation with padding: element (in k, out n) lies at input[k] + output[class_of[k]][n].
///
/// Engines pack in panels, so that the inputs fall into a few classes that place their outputs
/// alike; ONNX Runtime's fp32 packing has one class, or two if the last panel is narrower. That
/// keeps a layout at a few numbers per input and output instead of one per value. Immutable.
class Layout {
 public:
  static constexpr size_t kMaxClasses = 64;

  static std::shared_ptr<const Layout> Plain(Shape shape, Stored stored);

  /// The weight to give an engine to pack: each value's bits name its own (k, n). `out` holds
  /// shape.size() values in the order of `stored`.
  static void ProbeValues(Shape shape, Stored stored, float* out);

  /// Reads the layout off `elements` values that an engine made of ProbeValues. Other values are
  /// padding, and so are copies of the last output that follow it.
  /// Throws Error(kUnsupported) if it is no such permutation.
  static std::shared_ptr<const Layout> FromProbe(const float* block, uint64_t elements,
                                                 Shape shape);

  /// Inverse of ToBytes; throws Error(kInvalidArgument) unless it is a sound layout.
  static std::shared_ptr<const Layout> FromBytes(const std::string& bytes);
  std::string ToBytes() const;

  Shape shape() const { return shape_; }
  /// Elements that a block must have, padding included.
  uint64_t elements() const { return elements_; }
  /// Outputs that lie side by side for every input, in groups of this size; 1 if none.
  uint64_t line() const { return line_; }
  /// Whether outputs 16 i … 16 i + 15 lie side by side, for every i and input.
  bool keeps_lines() const { return line_ % 16 == 0 || line_ == shape_.out; }
  /// Whether a block is row-major, as a weight that is stored so.
  bool IsPlain(Stored stored) const;
  uint32_t Offset(uint64_t k, uint64_t n) const { return input_[k] + OutputsOf(k)[n]; }
  /// Writes Offset(k, n) for the inputs [k0, k1).
  void Offsets(uint64_t k0, uint64_t k1, uint64_t n, uint32_t* offsets) const;
  /// Offset(k, n) is input(k) + OutputsOf(k)[n], modulo 2^32.
  const uint32_t* OutputsOf(uint64_t k) const {
    return outputs_.data() + class_of_[k] * shape_.out;
  }

 private:
  Layout(Shape shape, uint64_t elements);
  void AddInput(uint64_t k, uint32_t first, const uint32_t* outputs);
  void FindLine();
  void RequireInjective() const;

  Shape shape_;
  uint64_t elements_;
  uint64_t line_ = 1;
  std::vector<uint32_t> input_;    // (in)
  std::vector<uint8_t> class_of_;  // (in)
  std::vector<uint32_t> outputs_;  // (classes, out), relative to the first output
};

}  // namespace edge_lora
