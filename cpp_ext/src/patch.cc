#include "patch.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "simd.h"

namespace edge_lora {
namespace {

template <size_t kRun>
void ExchangeRuns(const uint32_t* offsets, size_t count, float* values, float* block) {
  struct Run {
    float element[kRun];
  };
  for (size_t i = 0; i < count; ++i) {
    float* there = block + offsets[i];
    float* here = values + i * kRun;
    Run old;
    Run fresh;
    std::memcpy(&old, there, sizeof old);
    std::memcpy(&fresh, here, sizeof fresh);
    std::memcpy(there, &fresh, sizeof fresh);
    std::memcpy(here, &old, sizeof old);
  }
}

EL_CLONES void ExchangeLines(const uint32_t* offsets, size_t count, float* values, float* block) {
  for (size_t i = 0; i < count; ++i) {
    Line old;
    Line fresh;
    Load(block + offsets[i], old);
    Load(values + i * kLine, fresh);
    Store(fresh, block + offsets[i]);
    Store(old, values + i * kLine);
  }
}

/// Whether the elements come in runs of `run` neighbours.
bool HasRuns(std::span<const uint32_t> offsets, size_t run) {
  if (offsets.size() % run != 0) return false;
  for (size_t i = 0; i < offsets.size(); i += run) {
    // Ascending and distinct, so the ends tell.
    if (offsets[i + run - 1] - offsets[i] != run - 1) return false;
  }
  return true;
}

/// Makes `values` point to a copy that `term` owns.
void Own(Values& values, Term& term) {
  const size_t codes = values.data_bytes();
  const std::shared_ptr<std::byte[]> copy(new std::byte[values.bytes()]);
  std::copy_n(values.data, codes, copy.get());
  std::copy_n(values.coding.stats, values.stats_bytes(), copy.get() + codes);
  values.data = copy.get();
  if (values.is_coded()) values.coding.stats = copy.get() + codes;
  term.owned.push_back(copy);
}

}  // namespace

size_t Patch::bytes() const {
  size_t bytes = sizeof *this;
  for (const ExchangePart& part : exchanges) {
    bytes += part.offsets.size() * sizeof(uint32_t) + part.values.size() * sizeof(float);
  }
  for (const DensePart& part : denses) {
    for (const Term& term : part.terms) {
      ForEachValues(term.fields, [&](const Values& values) { bytes += values.bytes(); });
      bytes += IndicesOf(term.fields).size() * sizeof(uint32_t);
    }
  }
  return bytes;
}

void Exchange(ExchangePart& part, size_t begin, size_t end, float* block) {
  const uint32_t* offsets = part.offsets.data() + begin;
  float* values = part.values.data() + begin * part.run;
  switch (part.run) {
    case 16:
      return ExchangeLines(offsets, end - begin, values, block);
    case 8:
      return ExchangeRuns<8>(offsets, end - begin, values, block);
    default:
      return ExchangeRuns<1>(offsets, end - begin, values, block);
  }
}

ExchangePart MakeExchange(uint32_t slot, uint32_t place, std::vector<uint32_t> offsets,
                          std::vector<float> values) {
  ExchangePart part{slot, place, 1, std::move(offsets), std::move(values)};
  for (const uint32_t run : {16U, 8U}) {
    if (!HasRuns(part.offsets, run)) continue;
    std::vector<uint32_t> firsts(part.offsets.size() / run);
    for (size_t i = 0; i < firsts.size(); ++i) firsts[i] = part.offsets[i * run];
    part.offsets = std::move(firsts);
    part.run = run;
    break;
  }
  return part;
}

Term MakeTerm(const Fields& fields, float factor) {
  Term term{fields, factor, {}};
  ForEachValues(term.fields, [&](Values& values) { Own(values, term); });
  return term;
}

}  // namespace edge_lora
