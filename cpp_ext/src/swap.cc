#include "swap.h"

#include <algorithm>
#include <span>

#include "dense.h"
#include "lines.h"
#include "parallel.h"

namespace edge_lora {
namespace {

// Elements of a chunk: enough to hide the cost of handing it out (about 1 % at 16 us a chunk),
// few enough to keep all threads busy to the end.
constexpr size_t kChunk = 16384;

struct Chunk {
  ExchangePart* part;
  size_t begin;
  size_t end;
};

void WriteRect(const DenseJob& job, const Rect& rect) {
  const Slot& slot = *job.slot;
  const Place& first = slot.places[0];
  const std::span<const Term> terms =
      job.part != nullptr ? std::span(job.part->terms) : std::span<const Term>();
  const DeltaOnRect delta(terms, slot.pristine.shape(), rect);
  thread_local std::vector<float> values;
  if (!job.in_place) slot.pristine.Read(rect, values);
  Tile base_tile;
  Tile tile;
  ForEachTile(rect, [&](const Rect& part) {
    Lines lines = LoadLines(*first.layout, first.block, part, tile);
    if (job.in_place) {
      delta.AddTo(lines, part, lines);
    } else {
      const Lines base = PristineLines(slot.pristine, values, rect, part, base_tile);
      if (terms.empty()) {
        lines = base;
      } else {
        delta.AddTo(base, part, lines);
      }
    }
    for (const Place& place : slot.places) StoreLines(lines, *place.layout, part, place.block);
  });
  FinishCopies();
}

}  // namespace

uint64_t ExchangeAll(Patch& patch, const std::vector<Slot>& slots, int threads) {
  std::vector<Chunk> chunks;
  uint64_t elements = 0;
  for (ExchangePart& part : patch.exchanges) {
    const size_t runs = kChunk / part.run;
    for (size_t begin = 0; begin < part.offsets.size(); begin += runs) {
      chunks.push_back({&part, begin, std::min(begin + runs, part.offsets.size())});
    }
    elements += part.values.size();
  }
  ParallelFor(chunks.size(), threads, [&](size_t i) {
    const Chunk& chunk = chunks[i];
    const Slot& slot = slots[chunk.part->slot];
    Exchange(*chunk.part, chunk.begin, chunk.end, slot.places[chunk.part->place].block);
  });
  return elements * sizeof(float);
}

uint64_t WriteDense(const std::vector<DenseJob>& jobs, int threads) {
  struct Piece {
    const DenseJob* job;
    Rect rect;
  };
  std::vector<Piece> pieces;
  uint64_t elements = 0;
  for (const DenseJob& job : jobs) {
    const Pristine& pristine = job.slot->pristine;
    for (const Rect& rect : job.in_place ? pristine.CutInPlace() : pristine.Cut()) {
      pieces.push_back({&job, rect});
    }
    elements += job.slot->pristine.shape().size() * job.slot->places.size();
  }
  ParallelFor(pieces.size(), threads, [&](size_t i) { WriteRect(*pieces[i].job, pieces[i].rect); });
  return elements * sizeof(float);
}

}  // namespace edge_lora
