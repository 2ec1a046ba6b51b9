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

ExchangePlan PlanExchange(Patch* patch) {
  ExchangePlan plan;
  if (patch == nullptr) return plan;
  for (ExchangePart& part : patch->exchanges) {
    const size_t runs = kChunk / part.run;
    for (size_t begin = 0; begin < part.offsets.size(); begin += runs) {
      plan.chunks.push_back({&part, begin, std::min(begin + runs, part.offsets.size())});
    }
    plan.bytes += part.values.size() * sizeof(float);
  }
  return plan;
}

void ExchangeAll(const ExchangePlan& plan, const std::vector<Slot>& slots, int threads) {
  ParallelFor(plan.chunks.size(), threads, [&](size_t i) {
    const auto& [part, begin, end] = plan.chunks[i];
    Exchange(*part, begin, end, slots[part->slot].places[part->place].block);
  });
}

DensePlan PlanDense(const std::vector<DenseJob>& jobs) {
  DensePlan plan;
  for (const DenseJob& job : jobs) {
    const Pristine& pristine = job.slot->pristine;
    for (const Rect& rect : job.in_place ? pristine.CutInPlace() : pristine.Cut()) {
      plan.pieces.push_back({job, rect});
    }
    plan.bytes += pristine.shape().size() * job.slot->places.size() * sizeof(float);
  }
  return plan;
}

void WriteDense(const DensePlan& plan, int threads) {
  ParallelFor(plan.pieces.size(), threads,
              [&](size_t i) { WriteRect(plan.pieces[i].job, plan.pieces[i].rect); });
}

}  // namespace edge_lora
