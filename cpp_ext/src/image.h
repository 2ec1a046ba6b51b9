// The engine's packed weights of one session, patchable in place.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "adapter_file.h"
#include "layout.h"
#include "patch.h"
#include "tile.h"

namespace edge_lora {

/// A block of the engine that holds a slot's weight.
struct Place {
  std::shared_ptr<const Layout> layout;
  float* block = nullptr;
  uint64_t bytes = 0;
};

struct Slot {
  std::string name;
  Pristine pristine;
  std::vector<Place> places;  ///< Several if tied weights are packed more than once.
  double largest = 0;         ///< Largest magnitude of the pristine weight, once a place is known.
  std::set<uint64_t> poked;   ///< Flat indices that a self-test changed and has not put back.
};

struct SwapStats {
  double ms = 0;
  uint64_t bytes = 0;  ///< Of weights written.
};

/// Weighted adapters that add up.
using Parts = std::vector<std::pair<std::shared_ptr<const AdapterFile>, double>>;

/// Safe to call from many threads; calls take turns. Whoever runs the engine must not do so during
/// Swap or Poke. The engine owns the blocks and must outlive the last call before Close.
class Image {
 public:
  explicit Image(int threads);
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;

  /// Lets adapters call a slot (tied weights) by another name too.
  void AddAlias(const std::string& name, const std::string& alias);
  /// Declares a slot and where its pristine fp32 weight lies on disk.
  void AddSlot(const std::string& name, Shape shape, const std::string& path, uint64_t offset,
               Stored stored);
  /// Binds a block to the slot, if it holds exactly the slot's pristine weight: every value is
  /// compared. Returns whether it does.
  bool AddPlace(const std::string& name, std::shared_ptr<const Layout> layout, float* block,
                uint64_t bytes);

  /// Compiles base + sum of weight * adapter. Does not write to the image.
  std::shared_ptr<Patch> Compile(const Parts& parts);
  /// Reads a patch that was saved for an equal image.
  std::shared_ptr<Patch> LoadPatch(const std::string& path);
  /// Takes the active patch out and puts `next` in (null: the base), as one step. On an error the
  /// image is as it was before, or damaged.
  SwapStats Swap(const std::shared_ptr<Patch>& next);
  /// Whether a swap failed and could not be undone: the weights are a mixture, every later call
  /// but Close throws, and the engine must not be run any more.
  bool is_damaged();
  std::shared_ptr<Patch> active();

  /// Exchanges one value, at a flat index in (out, in), in all places; returns the old one.
  float Poke(const std::string& name, uint64_t index, float value);
  /// Slots whose bytes are not the pristine weight's.
  std::vector<std::string> DifferingSlots();
  /// Over all places' bytes in the order of slots.
  std::string Sha256();
  /// The shape of a slot; for sizing what Merged fills.
  Shape ShapeOf(const std::string& name);
  /// Writes the weight now in use as (out, in).
  void Merged(const std::string& name, float* out);
  /// Forgets the blocks. Every later call throws.
  void Close();

 private:
  Slot& Find(const std::string& name);
  void RequireOpen() const;
  std::string Signature() const;
  Place CheckedPlace(const Slot& slot, std::shared_ptr<const Layout> layout, float* block,
                     uint64_t bytes) const;
  bool Matches(const Slot& slot, const Place& place, float* largest) const;
  bool MatchesOn(const Slot& slot, const Place& place, const Rect& rect, uint32_t* largest) const;

  const uint64_t number_;
  const int threads_;
  std::mutex mutex_;
  std::vector<Slot> slots_;
  std::map<std::string, size_t> index_;
  std::map<std::string, std::shared_ptr<const File>> files_;
  std::shared_ptr<Patch> active_;
  bool is_closed_ = false;
  bool is_damaged_ = false;  ///< A swap failed and could not be rolled back.
};

}  // namespace edge_lora
