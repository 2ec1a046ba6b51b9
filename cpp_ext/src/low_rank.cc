#include "low_rank.h"

#include <algorithm>
#include <iterator>
#include <optional>

#include "status.h"

namespace edge_lora {
namespace {

using Ranks = std::vector<uint32_t>;

Ranks RanksOf(const LowRank& form) { return form.ranks.empty() ? Ranks{form.rank} : form.ranks; }

/// Ranks at which all low-rank forms work, ascending.
Ranks CommonRanks(const std::vector<Delta>& deltas) {
  std::optional<Ranks> common;
  for (const Delta& delta : deltas) {
    for (const Form& form : delta.forms) {
      const auto* low_rank = std::get_if<LowRank>(&form.fields);
      if (low_rank == nullptr) continue;
      const Ranks known = RanksOf(*low_rank);
      if (!common) common = known;
      Ranks both;
      std::ranges::set_intersection(*common, known, std::back_inserter(both));
      common = both;
    }
  }
  return common.value_or(Ranks());
}

}  // namespace

bool StackLowRank(const AdapterFile& adapter, const std::string& slot, StackedLowRank& stacked) {
  const Delta* delta = adapter.Find(slot);
  if (delta == nullptr) {
    throw Error(Code::kAdapterMismatch, "the adapter has no delta for slot '" + slot + "'");
  }
  stacked = {};
  uint64_t rank = 0;
  for (const Form& form : delta->forms) {
    const auto* low_rank = std::get_if<LowRank>(&form.fields);
    if (low_rank == nullptr) return false;
    rank += low_rank->rank;
  }
  if (rank > UINT32_MAX) {
    throw Error(Code::kUnsupported, "the low-rank forms of slot '" + slot + "' have a rank of " +
                                        std::to_string(rank) + " together");
  }
  stacked.rank = static_cast<uint32_t>(rank);
  const auto [out, in] = delta->shape;
  stacked.a.resize(in * stacked.rank);
  stacked.b.resize(out * stacked.rank);
  std::vector<float> row(in);
  uint64_t first = 0;
  for (const Form& form : delta->forms) {
    const auto& low_rank = std::get<LowRank>(form.fields);
    const auto factor = static_cast<float>(adapter.alpha() * form.scale);
    for (uint32_t r = 0; r < low_rank.rank; ++r) {
      ToFloat(low_rank.a, r * in, in, row.data());
      for (uint64_t k = 0; k < in; ++k) stacked.a[k * stacked.rank + first + r] = row[k];
    }
    float* b = stacked.b.data() + first * out;
    ToFloat(low_rank.bt, 0, uint64_t{low_rank.rank} * out, b);
    for (uint64_t i = 0; i < low_rank.rank * out; ++i) b[i] *= factor;
    first += low_rank.rank;
  }
  return true;
}

void CutToRank(std::vector<Delta>& deltas, uint32_t rank) {
  const Ranks common = CommonRanks(deltas);
  if (!std::ranges::binary_search(common, rank)) {
    std::string known;
    for (const uint32_t one : common) known += (known.empty() ? "" : ", ") + std::to_string(one);
    throw Error(Code::kUnsupported, "rank " + std::to_string(rank) +
                                        " is not among the ranks of this adapter: " +
                                        (known.empty() ? "its forms have none in common" : known));
  }
  for (Delta& delta : deltas) {
    for (Form& form : delta.forms) {
      auto* low_rank = std::get_if<LowRank>(&form.fields);
      if (low_rank == nullptr) continue;
      const auto found = std::ranges::find(low_rank->ranks, rank);
      if (found != low_rank->ranks.end()) {
        form.scale = low_rank->rank_scale[found - low_rank->ranks.begin()];
      }
      const auto [out, in] = delta.shape;
      form.fields = LowRank{rank, low_rank->a.First(rank * in), low_rank->bt.First(rank * out)};
    }
  }
}

}  // namespace edge_lora
