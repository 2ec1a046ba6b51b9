#include "inputs.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "status.h"

namespace edge_lora {
namespace {

constexpr const char* kTokens = "input_ids";
constexpr const char* kStart = "start";

/// Numbers that look random and are the same everywhere.
class Noise {
 public:
  float Next() {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;
    return static_cast<float>(state_ >> 40) / static_cast<float>(1U << 23) - 1.0F;
  }

 private:
  uint64_t state_ = 1;
};

[[noreturn]] void Refuse(const std::string& reason) {
  throw Error(Code::kBundle, "bundle: executorch: " + reason);
}

uint64_t CountOf(const std::vector<int32_t>& sizes) {
  uint64_t count = 1;
  for (const int32_t size : sizes) count *= static_cast<uint64_t>(size);
  return count;
}

template <typename T>
void Append(std::vector<uint8_t>& bytes, T value) {
  const auto at = bytes.size();
  bytes.resize(at + sizeof value);
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

class Maker {
 public:
  Maker(const Bundle& bundle, const Window& window) : bundle_(bundle), window_(window) {
    for (const BundleInput& input : bundle.inputs) Learn(input);
    if (bundle.cache_length > 0) {
      for (const BundleInput& input : bundle.inputs) {
        if (input.name == kTokens && !input.axes.empty()) {
          symbols_[input.axes.back().name] = window.tokens;
        }
      }
    }
  }

  MadeInput Make(const std::string& name, const TensorSpec& spec) {
    MadeInput made;
    made.type = spec.type;
    made.sizes = SizesOf(name, spec);
    if (made.sizes.size() != spec.sizes.size() ||
        !std::ranges::equal(made.sizes, spec.sizes, std::ranges::less_equal())) {
      Refuse("input " + name + " has another shape than the program's");
    }
    Fill(name, made);
    return made;
  }

 private:
  const Json* CanaryOf(const std::string& name) const {
    const auto found = bundle_.canary.find(name);
    return found == bundle_.canary.end() ? nullptr : &*found;
  }

  void Learn(const BundleInput& input) {
    const Json* canary = CanaryOf(input.name);
    if (canary == nullptr) return;
    const Json& shape = ArrayIn(*canary, "shape");
    for (size_t i = 0; i < std::min(shape.size(), input.axes.size()); ++i) {
      if (!input.axes[i].name.empty()) symbols_[input.axes[i].name] = Natural(shape[i], "shape");
    }
  }

  std::vector<int32_t> SizesOf(const std::string& name, const TensorSpec& spec) const {
    const auto named = [&](const BundleInput& input) { return input.name == name; };
    const auto input = std::ranges::find_if(bundle_.inputs, named);
    if (input == bundle_.inputs.end()) return SlotSizes(name, spec);
    std::vector<int32_t> sizes;
    for (const Axis& axis : input->axes) {
      const auto symbol = symbols_.find(axis.name);
      const uint64_t size = axis.size > 0              ? axis.size
                            : symbol == symbols_.end() ? 1
                                                       : symbol->second;
      if (size > INT32_MAX) Refuse("input " + name + " is too large");
      sizes.push_back(static_cast<int32_t>(size));
    }
    return sizes;
  }

  /// Of an input that belongs to a slot: a is (in, rank), b is (rank, out).
  std::vector<int32_t> SlotSizes(const std::string& name, const TensorSpec& spec) const {
    for (const BundleSlot& slot : bundle_.slots) {
      const auto found = std::ranges::find(slot.lora_inputs, name);
      if (found == slot.lora_inputs.end() || spec.sizes.size() != 2) continue;
      const bool is_a = found == slot.lora_inputs.begin();
      return is_a ? std::vector<int32_t>{spec.sizes[0], 1} : std::vector<int32_t>{1, spec.sizes[1]};
    }
    Refuse("input " + name + " is not described");
  }

  void Fill(const std::string& name, MadeInput& made) {
    const uint64_t count = CountOf(made.sizes);
    const bool is_slot = std::ranges::none_of(
        bundle_.inputs, [&](const BundleInput& input) { return input.name == name; });
    const Json* canary = CanaryOf(name);
    const Json* values = canary == nullptr ? nullptr : &ArrayIn(*canary, "values");
    for (uint64_t i = 0; i < count; ++i) {
      double value = made.type == ScalarType::Float && !is_slot ? noise_.Next() : 0.0;
      if (values != nullptr && !values->empty()) {
        value = (*values)[i % values->size()].get<double>();
      }
      if (bundle_.cache_length > 0 && name == kStart) value = static_cast<double>(window_.start);
      Put(made, value, name);
    }
  }

  static void Put(MadeInput& made, double value, const std::string& name) {
    switch (made.type) {
      case ScalarType::Float:
        return Append(made.values, static_cast<float>(value));
      case ScalarType::Double:
        return Append(made.values, value);
      case ScalarType::Long:
        return Append(made.values, static_cast<int64_t>(value));
      case ScalarType::Int:
        return Append(made.values, static_cast<int32_t>(value));
      case ScalarType::Byte:
      case ScalarType::Bool:
        return Append(made.values, static_cast<uint8_t>(value != 0 ? 1 : 0));
      default:
        Refuse("input " + name +
               " has a type that this tool does not feed: " + std::string(NameOf(made.type)));
    }
  }

  const Bundle& bundle_;
  Window window_;
  std::map<std::string, uint64_t> symbols_;
  Noise noise_;
};

}  // namespace

std::vector<MadeInput> MakeInputs(const Bundle& bundle, const Program& program,
                                  const Window& window) {
  const std::set<std::string> distinct(bundle.input_order.begin(), bundle.input_order.end());
  if (bundle.input_order.size() != program.inputs().size() ||
      distinct.size() != bundle.input_order.size()) {
    Refuse("'input_order' has " + std::to_string(distinct.size()) + " names, the program takes " +
           std::to_string(program.inputs().size()) + " inputs");
  }
  Maker maker(bundle, window);
  std::vector<MadeInput> inputs;
  inputs.reserve(bundle.input_order.size());
  for (size_t i = 0; i < bundle.input_order.size(); ++i) {
    inputs.push_back(maker.Make(bundle.input_order[i], program.inputs()[i]));
  }
  return inputs;
}

std::vector<InputTensor> Views(const std::vector<MadeInput>& inputs) {
  std::vector<InputTensor> views;
  views.reserve(inputs.size());
  for (const MadeInput& input : inputs) {
    views.push_back({input.type, input.sizes, input.values.data()});
  }
  return views;
}

}  // namespace edge_lora
