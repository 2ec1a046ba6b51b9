// The C border: handles in, status codes out, no exception across.
#include <algorithm>
#include <cstring>
#include <new>

#include "adapter_file.h"
#include "allocator.h"
#include "cpu.h"
#include "edge_lora/edge_lora.h"
#include "image.h"
#include "layout.h"
#include "low_rank.h"
#include "patch.h"
#include "status.h"

using namespace edge_lora;

struct el_adapter {
  std::shared_ptr<const AdapterFile> file;
};
struct el_layout {
  std::shared_ptr<const Layout> layout;
};
struct el_image {
  explicit el_image(int threads) : image(threads) {}
  Image image;
};
struct el_patch {
  std::shared_ptr<Patch> patch;
};

namespace {

thread_local std::string last_error;
thread_local std::string last_status;

el_status Fail(Code code, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return static_cast<el_status>(code);
}

template <typename Work>
el_status Guard(const Work& work) noexcept {
  try {
    work();
    return EL_OK;
  } catch (const Error& error) {
    return Fail(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return Fail(Code::kOutOfMemory, "out of memory");
  } catch (const std::exception& error) {
    return Fail(Code::kInternal, error.what());
  } catch (...) {
    return Fail(Code::kInternal, "unknown exception");
  }
}

/// Refuses null where a pointer is needed.
template <typename... Pointers>
void Require(const Pointers*... pointers) {
  if (((pointers == nullptr) || ...)) throw Error(Code::kInvalidArgument, "a null argument");
}

Stored StoredFrom(el_stored stored) {
  if (stored != EL_STORED_OI && stored != EL_STORED_IO) {
    throw Error(Code::kInvalidArgument, "unknown el_stored");
  }
  return stored == EL_STORED_OI ? Stored::kOutIn : Stored::kInOut;
}

}  // namespace

// NOLINTBEGIN(cppcoreguidelines-owning-memory): a handle belongs to the caller.
extern "C" {

int32_t el_abi_version(void) { return EL_ABI_VERSION; }

const char* el_last_error(void) { return last_error.c_str(); }

const char* el_cpu_features(void) {
  static const std::string features = CpuFeatures();
  return features.c_str();
}

const char* el_allocator_status(void) {
  const el_status status = Guard([] { last_status = AllocatorStatus(); });
  return status == EL_OK ? last_status.c_str() : "";
}

el_allocator_stats el_get_allocator_stats(void) {
  const AllocatorStats stats = GetAllocatorStats();
  return {stats.reserved_bytes, stats.runtime_bytes, stats.cached_bytes, stats.hits, stats.misses};
}

size_t el_live_blocks(el_block* blocks, size_t capacity) {
  size_t count = 0;
  Guard([&] {
    const std::vector<LiveBlock> live = LiveBlocks();
    count = live.size();
    for (size_t i = 0; blocks != nullptr && i < std::min(count, capacity); ++i) {
      blocks[i] = {live[i].address, live[i].bytes, live[i].reserved};
    }
  });
  return count;
}

el_status el_adapter_open(const char* path, el_adapter** adapter) {
  return Guard([&] {
    Require(path, adapter);
    *adapter = new el_adapter{AdapterFile::Open(path)};
  });
}

el_status el_adapter_at_rank(const el_adapter* adapter, uint32_t rank, el_adapter** out) {
  return Guard([&] {
    Require(adapter, out);
    *out = new el_adapter{adapter->file->AtRank(rank)};
  });
}

void el_adapter_close(el_adapter* adapter) { delete adapter; }

const char* el_adapter_header(const el_adapter* adapter) { return adapter->file->header().c_str(); }

uint64_t el_adapter_bytes(const el_adapter* adapter) { return adapter->file->bytes(); }

size_t el_adapter_slot_count(const el_adapter* adapter) { return adapter->file->deltas().size(); }

const char* el_adapter_slot_name(const el_adapter* adapter, size_t i) {
  const auto& deltas = adapter->file->deltas();
  return i < deltas.size() ? deltas[i].slot.c_str() : nullptr;
}

el_status el_adapter_low_rank_shape(const el_adapter* adapter, const char* slot, uint32_t* rank,
                                    uint64_t* in_features, uint64_t* out_features) {
  return Guard([&] {
    Require(adapter, slot, rank, in_features, out_features);
    StackedLowRank stacked;
    *rank = StackLowRank(*adapter->file, slot, stacked) ? stacked.rank : 0;
    *in_features = adapter->file->Find(slot)->shape.in;
    *out_features = adapter->file->Find(slot)->shape.out;
  });
}

el_status el_adapter_low_rank(const el_adapter* adapter, const char* slot, float* a, float* b) {
  return Guard([&] {
    Require(adapter, slot, a, b);
    StackedLowRank stacked;
    if (!StackLowRank(*adapter->file, slot, stacked)) {
      throw Error(Code::kUnsupported, std::string("slot '") + slot + "' has other forms");
    }
    std::ranges::copy(stacked.a, a);
    std::ranges::copy(stacked.b, b);
  });
}

el_status el_layout_plain(uint64_t in_features, uint64_t out_features, el_stored stored,
                          el_layout** layout) {
  return Guard([&] {
    Require(layout);
    *layout = new el_layout{Layout::Plain({out_features, in_features}, StoredFrom(stored))};
  });
}

el_status el_layout_probe_values(uint64_t in_features, uint64_t out_features, el_stored stored,
                                 float* values) {
  return Guard([&] {
    Require(values);
    Layout::ProbeValues({out_features, in_features}, StoredFrom(stored), values);
  });
}

el_status el_layout_from_probe(const float* block, uint64_t bytes, uint64_t in_features,
                               uint64_t out_features, el_layout** layout) {
  return Guard([&] {
    Require(block, layout);
    *layout =
        new el_layout{Layout::FromProbe(block, bytes / sizeof(float), {out_features, in_features})};
  });
}

el_status el_layout_from_bytes(const void* data, size_t bytes, el_layout** layout) {
  return Guard([&] {
    Require(data, layout);
    *layout = new el_layout{Layout::FromBytes({static_cast<const char*>(data), bytes})};
  });
}

el_status el_layout_to_bytes(const el_layout* layout, void* data, size_t capacity, size_t* bytes) {
  return Guard([&] {
    Require(layout, bytes);
    const std::string all = layout->layout->ToBytes();
    *bytes = all.size();
    if (data != nullptr) std::memcpy(data, all.data(), std::min(capacity, all.size()));
  });
}

uint64_t el_layout_elements(const el_layout* layout) { return layout->layout->elements(); }

uint64_t el_layout_line(const el_layout* layout) { return layout->layout->line(); }

void el_layout_free(el_layout* layout) { delete layout; }

el_status el_image_open(int threads, el_image** image) {
  return Guard([&] {
    Require(image);
    *image = new el_image(threads);
  });
}

void el_image_close(el_image* image) { delete image; }

el_status el_image_add_slot(el_image* image, const char* name, uint64_t in_features,
                            uint64_t out_features, const char* file, uint64_t offset,
                            el_stored stored) {
  return Guard([&] {
    Require(image, name, file);
    image->image.AddSlot(name, {out_features, in_features}, file, offset, StoredFrom(stored));
  });
}

el_status el_image_add_alias(el_image* image, const char* name, const char* alias) {
  return Guard([&] {
    Require(image, name, alias);
    image->image.AddAlias(name, alias);
  });
}

el_status el_image_add_place(el_image* image, const char* name, const el_layout* layout,
                             float* block, uint64_t bytes, int32_t* bound) {
  return Guard([&] {
    Require(image, name, layout, bound);
    *bound = image->image.AddPlace(name, layout->layout, block, bytes) ? 1 : 0;
  });
}

el_status el_image_compile(el_image* image, const el_adapter* const* adapters,
                           const double* weights, size_t count, el_patch** patch) {
  return Guard([&] {
    Require(image, patch);
    if (count > 0) Require(adapters, weights);
    Parts parts;
    for (size_t i = 0; i < count; ++i) {
      Require(adapters[i]);
      parts.emplace_back(adapters[i]->file, weights[i]);
    }
    *patch = new el_patch{image->image.Compile(parts)};
  });
}

el_status el_image_load_patch(el_image* image, const char* path, el_patch** patch) {
  return Guard([&] {
    Require(image, path, patch);
    *patch = new el_patch{image->image.LoadPatch(path)};
  });
}

el_status el_image_swap(el_image* image, el_patch* patch, el_swap_stats* stats) {
  return Guard([&] {
    Require(image);
    const SwapStats found = image->image.Swap(patch != nullptr ? patch->patch : nullptr);
    if (stats != nullptr) *stats = {found.ms, found.bytes};
  });
}

el_status el_image_damaged(el_image* image, int32_t* damaged) {
  return Guard([&] {
    Require(image, damaged);
    *damaged = image->image.is_damaged() ? 1 : 0;
  });
}

el_status el_image_poke(el_image* image, const char* name, uint64_t index, float value,
                        float* old) {
  return Guard([&] {
    Require(image, name);
    const float found = image->image.Poke(name, index, value);
    if (old != nullptr) *old = found;
  });
}

el_status el_image_differing_slots(el_image* image, size_t* count) {
  return Guard([&] {
    Require(image, count);
    *count = image->image.DifferingSlots().size();
  });
}

el_status el_image_sha256(el_image* image, char hex[65]) {
  return Guard([&] {
    Require(image, hex);
    std::strcpy(hex, image->image.Sha256().c_str());
  });
}

el_status el_image_merged(el_image* image, const char* name, float* weight) {
  return Guard([&] {
    Require(image, name, weight);
    image->image.Merged(name, weight);
  });
}

uint64_t el_patch_bytes(const el_patch* patch) { return patch->patch->bytes(); }

uint64_t el_patch_changed(const el_patch* patch) { return patch->patch->changed; }

size_t el_patch_slot_count(const el_patch* patch) { return patch->patch->slots.size(); }

const char* el_patch_slot_name(const el_patch* patch, size_t i) {
  const auto& slots = patch->patch->slots;
  return i < slots.size() ? slots[i].c_str() : nullptr;
}

el_status el_patch_save(el_patch* patch, const char* path) {
  return Guard([&] {
    Require(patch, path);
    SavePatch(*patch->patch, path);
  });
}

void el_patch_free(el_patch* patch) { delete patch; }

}  // extern "C"
// NOLINTEND(cppcoreguidelines-owning-memory)

static_assert(static_cast<int>(Code::kInternal) == EL_INTERNAL);
