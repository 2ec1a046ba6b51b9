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
  const std::shared_ptr<std::byte[]> copy(new std::byte[values.bytes()]);
  std::copy_n(values.data, values.bytes(), copy.get());
  values.data = copy.get();
  term.owned.push_back(copy);
}

size_t BytesOf(const Fields& fields) {
  if (const auto* low_rank = std::get_if<LowRank>(&fields)) {
    return low_rank->a.bytes() + low_rank->bt.bytes();
  }
  if (const auto* sparse = std::get_if<Sparse>(&fields)) {
    return sparse->indices.size() * sizeof(uint32_t) + sparse->values.bytes();
  }
  if (const auto* block = std::get_if<Block>(&fields)) {
    return block->indices.size() * sizeof(uint32_t) + block->values.bytes();
  }
  return std::get<Dense>(fields).values.bytes();
}

}  // namespace

size_t Patch::bytes() const {
  size_t bytes = sizeof *this;
  for (const ExchangePart& part : exchanges) {
    bytes += part.offsets.size() * sizeof(uint32_t) + part.values.size() * sizeof(float);
  }
  for (const DensePart& part : denses) {
    for (const Term& term : part.terms) bytes += BytesOf(term.fields);
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
  if (auto* low_rank = std::get_if<LowRank>(&term.fields)) {
    Own(low_rank->a, term);
    Own(low_rank->bt, term);
  }
  if (auto* sparse = std::get_if<Sparse>(&term.fields)) Own(sparse->values, term);
  if (auto* block = std::get_if<Block>(&term.fields)) Own(block->values, term);
  if (auto* dense = std::get_if<Dense>(&term.fields)) Own(dense->values, term);
  return term;
}

}  // namespace edge_lora
