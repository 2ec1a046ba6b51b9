// edge_lora._core: types in, types out. edge_lora/_core.pyi is its contract.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "adapter_file.h"
#include "allocator.h"
#include "cpu.h"
#include "edge_lora/edge_lora.h"
#include "image.h"
#include "layout.h"
#include "low_rank.h"
#include "patch.h"
#include "status.h"
#include "translate.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace edge_lora {
namespace {

using NoGil = nb::call_guard<nb::gil_scoped_release>;
using Matrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

/// An array of Python's that owns its memory, filled by `fill` while the GIL is released.
template <typename Fill>
Matrix MakeMatrix(uint64_t rows, uint64_t columns, const Fill& fill) {
  auto values = std::make_unique<float[]>(rows * columns);
  {
    const nb::gil_scoped_release release;
    fill(values.get());
  }
  const nb::capsule owner(values.get(), [](void* memory) noexcept {
    const std::unique_ptr<float[]> freed(static_cast<float*>(memory));
  });
  return {values.release(), {rows, columns}, owner};
}

Stored StoredFrom(const std::string& name) {
  if (name != "oi" && name != "io") {
    throw Error(Code::kInvalidArgument, "stored is '" + name + "', must be 'oi' or 'io'");
  }
  return name == "oi" ? Stored::kOutIn : Stored::kInOut;
}

float* BlockAt(uintptr_t address) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): Python has no pointers.
  return reinterpret_cast<float*>(address);
}

void BindAllocator(nb::module_& module) {
  module.def("allocator_status", &AllocatorStatus);
  module.def("live_blocks", [] {
    std::vector<std::tuple<uintptr_t, size_t, bool>> blocks;
    for (const LiveBlock& block : LiveBlocks()) {
      blocks.emplace_back(block.address, block.bytes, block.reserved);
    }
    return blocks;
  });
  module.def("allocator_stats", [] {
    const AllocatorStats stats = GetAllocatorStats();
    nb::dict fields;
    fields["reserved_bytes"] = stats.reserved_bytes;
    fields["runtime_bytes"] = stats.runtime_bytes;
    fields["cached_bytes"] = stats.cached_bytes;
    fields["hits"] = stats.hits;
    fields["misses"] = stats.misses;
    return fields;
  });
}

void BindAdapterFile(nb::module_& module) {
  nb::class_<AdapterFile>(module, "AdapterFile")
      .def(nb::new_([](const std::string& path) {
             const nb::gil_scoped_release release;
             return AdapterFile::Open(path);
           }),
           "path"_a)
      .def_prop_ro("header", &AdapterFile::header)
      .def_prop_ro("nbytes", &AdapterFile::bytes)
      .def("at_rank", &AdapterFile::AtRank, "rank"_a)
      .def(
          "low_rank",
          [](const AdapterFile& adapter, const std::string& slot) -> nb::object {
            StackedLowRank stacked;
            if (!StackLowRank(adapter, slot, stacked)) return nb::none();
            const auto copy = [](const std::vector<float>& from) {
              return [&from](float* to) { std::ranges::copy(from, to); };
            };
            const Shape shape = adapter.Find(slot)->shape;
            return nb::make_tuple(MakeMatrix(shape.in, stacked.rank, copy(stacked.a)),
                                  MakeMatrix(stacked.rank, shape.out, copy(stacked.b)));
          },
          "slot"_a);
}

void BindLayout(nb::module_& module) {
  nb::class_<Layout>(module, "Layout")
      .def_static(
          "plain",
          [](uint64_t in, uint64_t out, const std::string& stored) {
            return Layout::Plain({out, in}, StoredFrom(stored));
          },
          "in_features"_a, "out_features"_a, "stored"_a)
      .def_static(
          "probe_values",
          [](uint64_t in, uint64_t out, const std::string& stored) {
            const Stored order = StoredFrom(stored);
            const bool out_in = order == Stored::kOutIn;
            return MakeMatrix(out_in ? out : in, out_in ? in : out, [&](float* values) {
              Layout::ProbeValues({out, in}, order, values);
            });
          },
          "in_features"_a, "out_features"_a, "stored"_a)
      .def_static(
          "from_probe",
          [](uintptr_t address, uint64_t nbytes, uint64_t in, uint64_t out) {
            return Layout::FromProbe(BlockAt(address), nbytes / sizeof(float), {out, in});
          },
          "address"_a, "nbytes"_a, "in_features"_a, "out_features"_a, NoGil())
      .def_static(
          "from_bytes",
          [](const nb::bytes& data) { return Layout::FromBytes({data.c_str(), data.size()}); },
          "data"_a)
      .def("to_bytes",
           [](const Layout& layout) {
             const std::string bytes = layout.ToBytes();
             return nb::bytes(bytes.data(), bytes.size());
           })
      .def_prop_ro("elements", &Layout::elements)
      .def_prop_ro("line", &Layout::line);
}

void BindPatch(nb::module_& module) {
  nb::class_<Patch>(module, "Patch")
      .def_prop_ro("nbytes", &Patch::bytes)
      .def_ro("changed", &Patch::changed)
      .def_ro("slots", &Patch::slots)
      .def("save", &SavePatch, "path"_a, NoGil());
  nb::class_<SwapStats>(module, "SwapStats")
      .def_ro("ms", &SwapStats::ms)
      .def_ro("bytes", &SwapStats::bytes);
}

void BindImage(nb::module_& module) {
  nb::class_<Image>(module, "Image")
      .def(nb::init<int>(), "threads"_a)
      .def(
          "add_slot",
          [](Image& image, const std::string& name, uint64_t in, uint64_t out,
             const std::string& file, uint64_t offset, const std::string& stored) {
            image.AddSlot(name, {out, in}, file, offset, StoredFrom(stored));
          },
          "name"_a, "in_features"_a, "out_features"_a, "file"_a, "offset"_a, "stored"_a)
      .def("add_alias", &Image::AddAlias, "name"_a, "alias"_a)
      .def(
          "add_place",
          [](Image& image, const std::string& name, std::shared_ptr<const Layout> layout,
             uintptr_t address, uint64_t nbytes) {
            return image.AddPlace(name, std::move(layout), BlockAt(address), nbytes);
          },
          "name"_a, "layout"_a, "address"_a, "nbytes"_a, NoGil())
      .def("compile", &Image::Compile, "parts"_a, NoGil())
      .def("load_patch", &Image::LoadPatch, "path"_a, NoGil())
      .def("swap", &Image::Swap, "patch"_a.none(), NoGil())
      .def_prop_ro("active", &Image::active)
      .def_prop_ro("damaged", &Image::is_damaged)
      .def("poke", &Image::Poke, "name"_a, "index"_a, "value"_a)
      .def("differing_slots", &Image::DifferingSlots, NoGil())
      .def("sha256", &Image::Sha256, NoGil())
      .def(
          "merged",
          [](Image& image, const std::string& name) {
            const Shape shape = image.ShapeOf(name);
            return MakeMatrix(shape.out, shape.in,
                              [&](float* values) { image.Merged(name, values); });
          },
          "name"_a)
      .def("close", &Image::Close);
}

}  // namespace
}  // namespace edge_lora

NB_MODULE(_core, module) {
  using namespace edge_lora;
  nb::set_leak_warnings(false);  // live sessions at exit are the engine's business
  nb::register_exception_translator(&Translate);
  module.def("abi_version", &el_abi_version);
  module.def("cpu_features", &CpuFeatures);
  BindAllocator(module);
  BindAdapterFile(module);
  BindLayout(module);
  BindPatch(module);
  BindImage(module);
}
