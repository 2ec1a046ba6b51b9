#include "image.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>

#include "compile.h"
#include "lines.h"
#include "parallel.h"
#include "patch_file.h"
#include "sha256.h"
#include "swap.h"

namespace edge_lora {
namespace {

[[noreturn]] void Refuse(const std::string& reason) { throw Error(Code::kInvalidArgument, reason); }

/// Bits of the largest magnitude: for magnitudes, bits and values are in the same order, and a NaN
/// comes out above all.
EL_CLONES uint32_t LargestBits(const float* values, size_t count) {
  int largest = 0;
  for (size_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::bit_cast<int>(values[i]) & INT32_MAX);
  }
  return static_cast<uint32_t>(largest);
}

const DensePart* DenseOf(const Patch* patch, size_t slot) {
  if (patch == nullptr) return nullptr;
  const auto found = std::ranges::find(patch->denses, slot, &DensePart::slot);
  return found != patch->denses.end() ? &*found : nullptr;
}

/// Throws Error(kUnsupported) with every slot whose forms are beside the weights.
void RequireFusible(const Parts& parts) {
  std::vector<std::string> problems;
  for (const auto& part : parts) {
    for (const Delta& delta : part.first->deltas()) {
      const auto is_beside = [](const Form& form) {
        return std::holds_alternative<Bottleneck>(form.fields);
      };
      if (std::ranges::any_of(delta.forms, is_beside)) {
        problems.push_back(delta.slot + ": a bottleneck runs unfused");
      }
    }
  }
  if (!problems.empty()) {
    throw Error(Code::kUnsupported, ListAll("the adapter cannot be fused", problems));
  }
}

std::atomic<uint64_t> images_made{0};

}  // namespace

Image::Image(int threads) : number_(++images_made), threads_(threads) {
  if (threads < 1) Refuse("threads is " + std::to_string(threads) + ", must be at least 1");
}

void Image::RequireOpen() const {
  if (is_closed_) Refuse("the image is closed");
  if (is_damaged_) Refuse("an earlier swap failed half way: open the bundle again");
}

Slot& Image::Find(const std::string& name) {
  RequireOpen();
  const auto found = index_.find(name);
  if (found == index_.end()) Refuse("no slot '" + name + "' in the image");
  return slots_[found->second];
}

void Image::AddSlot(const std::string& name, Shape shape, const std::string& path, uint64_t offset,
                    Stored stored) {
  const std::scoped_lock hold(mutex_);
  RequireOpen();
  if (index_.contains(name)) Refuse("slot '" + name + "' was added before");
  if (active_) Refuse("slots cannot be added while a patch is in");
  if (shape.in == 0 || shape.out == 0 || shape.in > UINT32_MAX || shape.out > UINT32_MAX ||
      shape.size() > UINT32_MAX || offset > INT64_MAX / 2) {
    Refuse("slot '" + name + "': its shape or offset is out of range");
  }
  auto& file = files_[path];
  if (!file) file = std::make_shared<const File>(path, Code::kBundle);
  Slot slot{name, Pristine(file, offset, shape, stored), {}, 0, {}};
  slot.pristine.RequireWhole();
  index_[name] = slots_.size();
  slots_.push_back(std::move(slot));
}

void Image::AddAlias(const std::string& name, const std::string& alias) {
  const std::scoped_lock hold(mutex_);
  Find(name);
  if (!index_.emplace(alias, index_.at(name)).second)
    Refuse("slot '" + alias + "' was added before");
}

Place Image::CheckedPlace(const Slot& slot, std::shared_ptr<const Layout> layout, float* block,
                          uint64_t bytes) const {
  if (layout->shape() != slot.pristine.shape()) {
    Refuse("slot '" + slot.name + "' and the layout have different shapes");
  }
  if (block == nullptr || layout->elements() > bytes / sizeof(float) ||
      reinterpret_cast<uintptr_t>(block) % alignof(float) != 0) {
    Refuse("slot '" + slot.name + "': a block of " + std::to_string(bytes) +
           " bytes cannot hold its layout of " + std::to_string(layout->elements()) + " values");
  }
  return {std::move(layout), block, bytes};
}

bool Image::MatchesOn(const Slot& slot, const Place& place, const Rect& rect,
                      uint32_t* largest) const {
  thread_local std::vector<float> values;
  slot.pristine.Read(rect, values);
  if (largest != nullptr) *largest = LargestBits(values.data(), values.size());
  if (place.layout->IsPlain(slot.pristine.stored())) {
    return slot.pristine.SameRows(values, rect, place.block);
  }
  Tile wanted;
  Tile found;
  bool same = true;
  ForEachTile(rect, [&](const Rect& part) {
    same = same && SameLines(PristineLines(slot.pristine, values, rect, part, wanted),
                             LoadLines(*place.layout, place.block, part, found), part.k1 - part.k0);
  });
  return same;
}

bool Image::Matches(const Slot& slot, const Place& place, float* largest) const {
  if (!MatchesOn(slot, place, slot.pristine.FirstRow(), nullptr)) return false;
  const std::vector<Rect> rects = slot.pristine.Cut();
  std::vector<uint32_t> largest_of(rects.size());
  std::atomic<bool> same{true};
  ParallelFor(rects.size(), threads_, [&](size_t i) {
    if (same && !MatchesOn(slot, place, rects[i], &largest_of[i])) same = false;
  });
  if (largest != nullptr) *largest = std::bit_cast<float>(*std::ranges::max_element(largest_of));
  return same;
}

bool Image::AddPlace(const std::string& name, std::shared_ptr<const Layout> layout, float* block,
                     uint64_t bytes) {
  const std::scoped_lock hold(mutex_);
  Slot& slot = Find(name);
  if (active_) Refuse("places cannot be added while a patch is in");
  const Place place = CheckedPlace(slot, std::move(layout), block, bytes);
  for (const Slot& other : slots_) {
    for (const Place& taken : other.places) {
      const auto* begin = reinterpret_cast<const char*>(taken.block);
      const auto* address = reinterpret_cast<const char*>(block);
      if (address < begin + taken.bytes && begin < address + bytes) {
        Refuse("slot '" + name + "': the block overlaps one of slot '" + other.name + "'");
      }
    }
  }
  float largest = 0;
  if (!Matches(slot, place, &largest)) return false;
  slot.largest = largest;
  slot.places.push_back(place);
  return true;
}

std::shared_ptr<Patch> Image::Compile(const Parts& parts) {
  const std::scoped_lock hold(mutex_);
  RequireOpen();
  RequireFusible(parts);
  std::vector<std::string> problems;
  std::map<size_t, std::vector<WeightedForm>> forms_of;
  for (const auto& [adapter, weight] : parts) {
    for (const Delta& delta : adapter->deltas()) {
      const auto found = index_.find(delta.slot);
      if (found == index_.end()) {
        problems.push_back(delta.slot + ": no such slot");
      } else if (slots_[found->second].pristine.shape() != delta.shape) {
        problems.push_back(delta.slot + ": made for another shape");
      } else if (slots_[found->second].places.empty()) {
        problems.push_back(delta.slot + ": no block is bound to it");
      } else {
        const double strength = weight * adapter->alpha();
        for (const Form& form : delta.forms) {
          forms_of[found->second].push_back(
              {&form, strength, static_cast<float>(strength * form.scale)});
        }
      }
    }
  }
  if (!problems.empty()) {
    throw Error(Code::kAdapterMismatch, ListAll("the adapter does not fit this image", problems));
  }
  const std::vector<std::pair<size_t, std::vector<WeightedForm>>> work(forms_of.begin(),
                                                                       forms_of.end());
  std::vector<CompiledSlot> compiled(work.size());
  std::vector<std::string> failures(work.size());
  std::atomic<Code> code{Code::kOk};
  ParallelFor(work.size(), threads_, [&](size_t i) {
    const auto& [number, forms] = work[i];
    const Slot& slot = slots_[number];
    const bool is_patched =
        active_ && std::ranges::find(active_->slots, slot.name) != active_->slots.end();
    try {
      compiled[i] = CompileSlot(slot, static_cast<uint32_t>(number), forms,
                                !is_patched && slot.poked.empty());
    } catch (const Error& error) {
      failures[i] = slot.name + ": " + error.what();
      code = error.code();
    }
  });
  std::erase(failures, std::string());
  if (!failures.empty()) throw Error(code, ListAll("the adapter cannot be compiled", failures));
  auto patch = std::make_shared<Patch>();
  patch->signature = Signature();
  patch->image = number_;
  for (size_t i = 0; i < work.size(); ++i) {
    patch->slots.push_back(slots_[work[i].first].name);
    patch->changed += compiled[i].changed;
    std::ranges::move(compiled[i].exchanges, std::back_inserter(patch->exchanges));
    if (!compiled[i].dense.empty()) {
      patch->denses.push_back({static_cast<uint32_t>(work[i].first), std::move(compiled[i].dense)});
    }
  }
  return patch;
}

std::shared_ptr<Patch> Image::LoadPatch(const std::string& path) {
  const std::scoped_lock hold(mutex_);
  RequireOpen();
  auto patch = ReadPatch(path, slots_, Signature());
  patch->image = number_;
  return patch;
}

SwapStats Image::Swap(const std::shared_ptr<Patch>& next) {
  const std::scoped_lock hold(mutex_);
  RequireOpen();
  const auto start = std::chrono::steady_clock::now();
  if (next && next->image != number_) Refuse("the patch was compiled against another image");
  SwapStats stats;
  if (next == active_) return stats;
  const std::shared_ptr<Patch> old = active_;  // so that it outlives its lock
  // In the order of addresses: no two swaps lock two patches in opposite orders.
  const auto [first, second] = std::minmax({old.get(), next.get()}, std::less<>());
  std::unique_lock<std::mutex> hold_first;
  std::unique_lock<std::mutex> hold_second;
  if (first != nullptr) hold_first = std::unique_lock(first->mutex);
  if (second != nullptr) hold_second = std::unique_lock(second->mutex);

  std::vector<DenseJob> jobs;
  std::vector<DenseJob> rollback;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const DensePart* old_part = DenseOf(active_.get(), i);
    const DensePart* new_part = DenseOf(next.get(), i);
    if (old_part == nullptr && new_part == nullptr) continue;
    const bool in_place = old_part == nullptr && slots_[i].poked.empty();
    jobs.push_back({&slots_[i], new_part, in_place});
    rollback.push_back({&slots_[i], old_part, false});
    slots_[i].pristine.RequireWhole();
  }
  // All that takes memory comes before the first write, but for the dense step: exchanges, which
  // cannot fail, enclose it.
  const ExchangePlan take_out = PlanExchange(active_.get());
  const DensePlan write = PlanDense(jobs);
  const DensePlan write_back = PlanDense(rollback);
  const ExchangePlan put_in = PlanExchange(next.get());
  is_damaged_ = true;  // until the last step is done, or the first one undone
  ExchangeAll(take_out, slots_, threads_);
  try {
    WriteDense(write, threads_);
  } catch (...) {
    WriteDense(write_back, 1);  // one thread needs the least memory
    ExchangeAll(take_out, slots_, threads_);
    is_damaged_ = false;
    throw;
  }
  ExchangeAll(put_in, slots_, threads_);
  is_damaged_ = false;
  stats.bytes = take_out.bytes + write.bytes + put_in.bytes;
  if (active_) active_->is_in = false;
  if (next) next->is_in = true;
  active_ = next;
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  stats.ms = took.count();
  return stats;
}

bool Image::is_damaged() {
  const std::scoped_lock hold(mutex_);
  return is_damaged_;
}

std::shared_ptr<Patch> Image::active() {
  const std::scoped_lock hold(mutex_);
  return active_;
}

float Image::Poke(const std::string& name, uint64_t index, float value) {
  const std::scoped_lock hold(mutex_);
  Slot& slot = Find(name);
  const Shape shape = slot.pristine.shape();
  if (index >= shape.size() || slot.places.empty()) {
    Refuse("slot '" + name + "' has no value " + std::to_string(index));
  }
  const uint64_t k = index % shape.in;
  const uint64_t n = index / shape.in;
  const float pristine = slot.pristine.ReadOne(k, n);
  float old = 0;
  for (const Place& place : slot.places) {
    old = std::exchange(place.block[place.layout->Offset(k, n)], value);
  }
  if (std::bit_cast<uint32_t>(value) == std::bit_cast<uint32_t>(pristine)) {
    slot.poked.erase(index);
  } else {
    slot.poked.insert(index);
  }
  return old;
}

std::vector<std::string> Image::DifferingSlots() {
  const std::scoped_lock hold(mutex_);
  RequireOpen();
  std::vector<std::string> names;
  for (const Slot& slot : slots_) {
    const bool same = std::ranges::all_of(
        slot.places, [&](const Place& place) { return Matches(slot, place, nullptr); });
    if (!same) names.push_back(slot.name);
  }
  return names;
}

std::string Image::Sha256() {
  const std::scoped_lock hold(mutex_);
  RequireOpen();
  class Sha256 digest;
  for (const Slot& slot : slots_) {
    for (const Place& place : slot.places) digest.Update(place.block, place.bytes);
  }
  return digest.Finish();
}

Shape Image::ShapeOf(const std::string& name) {
  const std::scoped_lock hold(mutex_);
  return Find(name).pristine.shape();
}

void Image::Merged(const std::string& name, float* out) {
  const std::scoped_lock hold(mutex_);
  const Slot& slot = Find(name);
  if (slot.places.empty()) Refuse("slot '" + name + "' has no block");
  const Shape shape = slot.pristine.shape();
  const Place& place = slot.places.front();
  for (uint64_t n = 0; n < shape.out; ++n) {
    for (uint64_t k = 0; k < shape.in; ++k) *out++ = place.block[place.layout->Offset(k, n)];
  }
}

void Image::Close() {
  const std::scoped_lock hold(mutex_);
  is_closed_ = true;
  active_ = nullptr;
  slots_.clear();
  files_.clear();
}

std::string Image::Signature() const {
  class Sha256 digest;
  for (const Slot& slot : slots_) {
    const Shape shape = slot.pristine.shape();
    digest.Update(slot.name.c_str(), slot.name.size() + 1);
    digest.Update(&shape, sizeof shape);
    const uint64_t places = slot.places.size();
    digest.Update(&places, sizeof places);
    for (const Place& place : slot.places) {
      const std::string layout = place.layout->ToBytes();
      digest.Update(layout.data(), layout.size());
    }
  }
  return digest.Finish();
}

}  // namespace edge_lora
