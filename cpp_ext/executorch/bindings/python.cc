// edge_lora_executorch._native: types in, types out. _native.pyi is its contract.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "probe.h"
#include "program.h"
#include "status.h"
#include "translate.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edge_lora {
namespace {

using AnyArray = nb::ndarray<nb::ro, nb::device::cpu>;
using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>, nb::c_contig>;
using ReadOnlyBytes = nb::ndarray<nb::ro, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
/// (key, offset, in_features, out_features)
using Wanted = std::tuple<std::string, uint64_t, uint64_t, uint64_t>;

struct Dtype {
  ScalarType type;
  nb::dlpack::dtype dtype;
};

constexpr uint8_t CodeOf(nb::dlpack::dtype_code code) { return static_cast<uint8_t>(code); }

constexpr std::array kDtypes = {
    Dtype{ScalarType::Float, nb::dtype<float>()},
    Dtype{ScalarType::Double, nb::dtype<double>()},
    Dtype{ScalarType::Long, nb::dtype<int64_t>()},
    Dtype{ScalarType::Int, nb::dtype<int32_t>()},
    Dtype{ScalarType::Short, nb::dtype<int16_t>()},
    Dtype{ScalarType::Char, nb::dtype<int8_t>()},
    Dtype{ScalarType::Byte, nb::dtype<uint8_t>()},
    Dtype{ScalarType::Bool, nb::dtype<bool>()},
    Dtype{ScalarType::Half, {CodeOf(nb::dlpack::dtype_code::Float), 16, 1}},
};

InputTensor InputFrom(const AnyArray& array, size_t position) {
  InputTensor input;
  for (const Dtype& known : kDtypes) {
    if (array.dtype() == known.dtype) input.type = known.type;
  }
  if (array.size() == 0) {
    throw Error(Code::kInvalidArgument,
                "input " + std::to_string(position) + " is empty: a run takes one value or more");
  }
  int64_t stride = 1;
  bool is_contiguous = true;
  for (size_t d = array.ndim(); d-- > 0;) {
    is_contiguous &= array.shape(d) <= 1 || array.stride(d) == stride;
    stride *= static_cast<int64_t>(array.shape(d));
  }
  if (!is_contiguous) {
    throw Error(Code::kInvalidArgument, "input " + std::to_string(position) +
                                            " is not contiguous: pass numpy.ascontiguousarray(it)");
  }
  for (size_t d = 0; d < array.ndim(); ++d) {
    if (array.shape(d) > INT32_MAX) {
      throw Error(Code::kInvalidArgument, "input " + std::to_string(position) + " is too large");
    }
    input.sizes.push_back(static_cast<int32_t>(array.shape(d)));
  }
  input.data = array.data();
  return input;
}

nb::ndarray<nb::numpy> ArrayFrom(OutputTensor output, size_t position) {
  for (const Dtype& known : kDtypes) {
    if (output.type != known.type) continue;
    const std::vector<size_t> shape(output.sizes.begin(), output.sizes.end());
    const std::vector<int64_t> strides(output.strides.begin(), output.strides.end());
    void* data = output.data.release();
    const nb::capsule owner(data, [](void* memory) noexcept { FreeMemory()(memory); });
    return {data, shape.size(), shape.data(), owner, strides.data(), known.dtype};
  }
  throw Error(Code::kUnsupported,
              "output " + std::to_string(position) + " has a type that NumPy does not have");
}

/// The program, and the memory that it reads for as long as anybody runs it.
std::shared_ptr<Program> Holding(const AnyArray& pte, std::shared_ptr<Program> program) {
  Program* held = program.get();
  const auto release = [pte, program = std::move(program)](Program*) mutable { program.reset(); };
  return {held, release};
}

/// A program together with the Python memory that it reads from.
class PythonProgram {
 public:
  PythonProgram(const ReadOnlyBytes& pte, int packed_fd, int threads) {
    const std::span<const uint8_t> bytes(pte.data(), pte.size());
    const nb::gil_scoped_release release;
    program_ = Holding(AnyArray(pte), std::make_shared<Program>(bytes, FileAt(packed_fd), threads));
  }

  PythonProgram(const WritableBytes& pte, const std::vector<Wanted>& wanted, int packed_fd,
                int threads) {
    std::vector<ProbeSlot> slots;
    slots.reserve(wanted.size());
    for (const auto& [key, offset, in, out] : wanted) slots.push_back({key, offset, {out, in}});
    const std::span<uint8_t> bytes(pte.data(), pte.size());
    const nb::gil_scoped_release release;
    ProbedProgram probed = OpenProbed(bytes, PackedFile::At(packed_fd), threads, slots);
    program_ = Holding(AnyArray(pte), std::move(probed.program));
    layouts_ = std::move(probed.layouts);
  }

  Program& program() const {
    if (program_ == nullptr) throw Error(Code::kInvalidArgument, "the program is closed");
    return *program_;
  }

  nb::list Run(const nb::sequence& arrays) {
    // The arrays stay alive with the caller's sequence; the copies here keep them even if it is
    // changed meanwhile.
    std::vector<AnyArray> held;
    std::vector<InputTensor> inputs;
    for (const nb::handle item : arrays) {
      AnyArray array;
      if (!nb::try_cast<AnyArray>(item, array, false)) {
        throw Error(Code::kInvalidArgument,
                    "input " + std::to_string(held.size()) + " is not an array in memory");
      }
      inputs.push_back(InputFrom(array, held.size()));
      held.push_back(std::move(array));
    }
    const std::shared_ptr<Program> kept = program_;
    std::vector<OutputTensor> outputs;
    {
      Program& running = program();
      const nb::gil_scoped_release release;
      outputs = running.Run(inputs);
    }
    nb::list results;
    for (size_t i = 0; i < outputs.size(); ++i) {
      results.append(ArrayFrom(std::move(outputs[i]), i));
    }
    return results;
  }

  Bytes Packed() {
    if (program().packed() == nullptr) {
      throw Error(Code::kInvalidArgument, "the program was opened without packed_fd");
    }
    if (mapping_ == nullptr) mapping_ = program().packed()->Map();
    auto held = std::make_unique<std::shared_ptr<const Mapping>>(mapping_);
    const nb::capsule owner(held.get(), [](void* mapping) noexcept {
      const std::unique_ptr<std::shared_ptr<const Mapping>> freed(
          static_cast<std::shared_ptr<const Mapping>*>(mapping));
    });
    [[maybe_unused]] const void* owned = held.release();
    return {mapping_->data(), {mapping_->bytes()}, owner};
  }

  std::map<std::string, std::pair<uint64_t, uint64_t>> Entries() {
    static_cast<void>(Packed());
    std::map<std::string, std::pair<uint64_t, uint64_t>> entries;
    for (const auto& [name, entry] : ReadPackedIndex(mapping_->data(), mapping_->bytes())) {
      entries[name] = {entry.offset, entry.bytes};
    }
    return entries;
  }

  nb::list Layouts() const {
    nb::list all;
    for (const auto& layout : layouts_) {
      const std::string bytes = layout->ToBytes();
      all.append(nb::bytes(bytes.data(), bytes.size()));
    }
    return all;
  }

  /// Arrays that packed() returned stay valid; a run that is going on ends first. The file's memory
  /// is let go, too.
  void Close() {
    std::shared_ptr<Program> last = std::move(program_);
    mapping_.reset();
    const nb::gil_scoped_release release;
    last.reset();
  }

 private:
  static std::shared_ptr<const PackedFile> FileAt(int packed_fd) {
    return packed_fd < 0 ? nullptr : PackedFile::At(packed_fd);
  }

  std::shared_ptr<Program> program_;
  std::vector<std::shared_ptr<const Layout>> layouts_;
  std::shared_ptr<const Mapping> mapping_;
};

nb::list Describe(const std::vector<TensorSpec>& specs) {
  nb::list all;
  for (const TensorSpec& spec : specs) {
    nb::list sizes;
    for (const int32_t size : spec.sizes) sizes.append(size);
    all.append(nb::make_tuple(std::string(NameOf(spec.type)), nb::tuple(sizes)));
  }
  return all;
}

}  // namespace
}  // namespace edge_lora

// NOLINTNEXTLINE(performance-unnecessary-value-param): nanobind's macro.
NB_MODULE(_native, module) {
  using namespace edge_lora;
  nb::set_leak_warnings(false);  // live sessions at exit are the engine's business
  nb::register_exception_translator(&Translate);
  module.attr("version") = EDGE_LORA_EXECUTORCH_VERSION;
  nb::class_<PythonProgram>(module, "Program")
      .def(nb::init<const ReadOnlyBytes&, int, int>(), "pte"_a, "packed_fd"_a = -1, "threads"_a = 1)
      .def_static(
          "open_probed",
          [](const WritableBytes& pte, const std::vector<Wanted>& slots, int packed_fd,
             int threads) {
            return std::make_unique<PythonProgram>(pte, slots, packed_fd, threads);
          },
          "pte"_a, "slots"_a, "packed_fd"_a, "threads"_a = 1)
      .def_prop_ro("inputs", [](const PythonProgram& p) { return Describe(p.program().inputs()); })
      .def_prop_ro("outputs",
                   [](const PythonProgram& p) { return Describe(p.program().outputs()); })
      .def_prop_ro("layouts", &PythonProgram::Layouts)
      .def("run", &PythonProgram::Run, "inputs"_a)
      .def("packed", &PythonProgram::Packed)
      .def("entries", &PythonProgram::Entries)
      .def("close", &PythonProgram::Close);
}
