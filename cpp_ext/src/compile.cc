#include "compile.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "dense.h"
#include "lines.h"

namespace edge_lora {
namespace {

/// Offset in the high half, bits of a float in the low half: sorts without moving a second array.
using Entry = uint64_t;

Entry MakeEntry(uint32_t offset, float value) {
  return uint64_t{offset} << 32 | std::bit_cast<uint32_t>(value);
}
uint32_t OffsetOf(Entry entry) { return static_cast<uint32_t>(entry >> 32); }
float ValueOf(Entry entry) { return std::bit_cast<float>(static_cast<uint32_t>(entry)); }

/// Whether a form changes every value by a formula, at the swap, instead of naming new ones.
bool IsFormula(const WeightedForm& weighted) {
  const Fields& fields = weighted.form->fields;
  return std::holds_alternative<LowRank>(fields) || std::holds_alternative<RowScale>(fields);
}

/// Calls visit(k, n, i) for the i-th value of a form that is no formula.
template <typename Visit>
void ForEachValue(const Fields& fields, Shape shape, const Visit& visit) {
  if (const auto* sparse = std::get_if<Sparse>(&fields)) {
    uint64_t n = 0;
    uint64_t row = 0;
    for (size_t i = 0; i < sparse->indices.size(); ++i) {
      for (; sparse->indices[i] >= row + shape.in; row += shape.in) ++n;
      visit(sparse->indices[i] - row, n, i);
    }
    return;
  }
  const auto* block = std::get_if<Block>(&fields);
  const bool by_input = block != nullptr && !block->rows;
  const uint64_t width = by_input ? shape.out : shape.in;
  const uint64_t count = block != nullptr ? block->indices.size() : shape.out;
  size_t i = 0;
  for (uint64_t j = 0; j < count; ++j) {
    const uint64_t major = block != nullptr ? block->indices[j] : j;
    for (uint64_t minor = 0; minor < width; ++minor) {
      by_input ? visit(major, minor, i++) : visit(minor, major, i++);
    }
  }
}

void AppendEntries(const WeightedForm& weighted, const Layout& layout,
                   std::vector<Entry>& entries) {
  std::vector<float> values;
  ForEachValues(weighted.form->fields, [&](const Values& stored) {
    values.resize(stored.count);
    ToFloat(stored, 0, stored.count, values.data());
  });
  const size_t first = entries.size();
  entries.resize(first + values.size());
  Entry* out = entries.data() + first;
  // A product by one is exact, so "set" needs no case of its own.
  ForEachValue(weighted.form->fields, layout.shape(), [&](uint64_t k, uint64_t n, size_t i) {
    out[i] = MakeEntry(layout.Offset(k, n), values[i] * weighted.factor);
  });
}

/// Sorts by offset, stably: radix sort, low digit first.
void SortByOffset(std::vector<Entry>& entries, uint64_t elements) {
  constexpr int kDigit = 11;
  constexpr size_t kBuckets = size_t{1} << kDigit;
  if (std::ranges::is_sorted(entries, {}, OffsetOf)) return;
  std::vector<Entry> other(entries.size());
  const int bits = std::bit_width(elements);
  for (int shift = 32; shift < 32 + bits; shift += kDigit) {
    const auto digit = [shift](Entry entry) { return entry >> shift & (kBuckets - 1); };
    std::vector<size_t> next(kBuckets + 1);
    for (const Entry entry : entries) ++next[digit(entry) + 1];
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (const Entry entry : entries) other[next[digit(entry)]++] = entry;
    entries.swap(other);
  }
}

/// A block as it is for the pristine weight, whether or not a patch is in.
std::vector<float> PackPristine(const Slot& slot, const Layout& layout) {
  std::vector<float> block(layout.elements());
  std::vector<float> values;
  Tile tile;
  for (const Rect& rect : slot.pristine.Cut()) {
    slot.pristine.Read(rect, values);
    ForEachTile(rect, [&](const Rect& part) {
      StoreLines(PristineLines(slot.pristine, values, rect, part, tile), layout, part,
                 block.data());
    });
  }
  return block;
}

[[noreturn]] void RefuseNotFinite() {
  throw Error(Code::kInvalidArgument,
              "base + delta is not finite: the adapter is broken or its weight too large");
}

ExchangePart CompileExchange(const Slot& slot, uint32_t number, uint32_t place,
                             const std::vector<WeightedForm>& forms, bool is_pristine,
                             uint64_t& changed) {
  const Layout& layout = *slot.places[place].layout;
  std::vector<Entry> entries;
  for (const WeightedForm& weighted : forms) AppendEntries(weighted, layout, entries);
  SortByOffset(entries, layout.elements());
  const std::vector<float> packed = is_pristine ? std::vector<float>() : PackPristine(slot, layout);
  const float* base = is_pristine ? slot.places[place].block : packed.data();
  std::vector<uint32_t> offsets;
  std::vector<float> values;
  offsets.reserve(entries.size());
  values.reserve(entries.size());
  const bool replaces = forms.front().form->replaces;
  changed = 0;
  for (size_t i = 0; i < entries.size();) {
    const uint32_t offset = OffsetOf(entries[i]);
    float total = 0;
    float last = 0;
    for (; i < entries.size() && OffsetOf(entries[i]) == offset; ++i) {
      last = ValueOf(entries[i]);
      total += last;
    }
    const float value = replaces ? last : base[offset] + total;
    if (!std::isfinite(value)) RefuseNotFinite();
    changed += std::bit_cast<uint32_t>(value) != std::bit_cast<uint32_t>(base[offset]);
    offsets.push_back(offset);
    values.push_back(value);
  }
  return MakeExchange(number, place, std::move(offsets), std::move(values));
}

/// Computes every value once, for where BoundOf cannot promise that all are finite.
void RequireFinite(const Slot& slot, const std::vector<Term>& terms) {
  std::vector<float> values;
  Tile total;
  Tile tile;
  for (const Rect& rect : slot.pristine.Cut()) {
    slot.pristine.Read(rect, values);
    const DeltaOnRect delta(terms, slot.pristine.shape(), rect);
    ForEachTile(rect, [&](const Rect& part) {
      slot.pristine.TakeTile(values, rect, part, tile);
      delta.Sum(SpacedLines(tile.value[0], kLine, part.k1 - part.k0), part, total);
      if (!AddTile(total, part.k1 - part.k0, tile)) RefuseNotFinite();
    });
  }
}

void RequireComposable(const std::vector<WeightedForm>& forms) {
  for (const WeightedForm& weighted : forms) {
    if (!weighted.form->replaces) continue;
    if (forms.size() > 1) {
      throw Error(Code::kUnsupported,
                  "a form with mode 'set' replaces the weight and cannot be composed with others; "
                  "use it alone, or convert it to mode 'add'");
    }
    if (weighted.weight != 1.0) {
      throw Error(Code::kUnsupported, "a form with mode 'set' has strength 1 only, not " +
                                          std::to_string(weighted.weight));
    }
  }
}

}  // namespace

CompiledSlot CompileSlot(const Slot& slot, uint32_t number, const std::vector<WeightedForm>& forms,
                         bool is_pristine) {
  RequireComposable(forms);
  if (!std::ranges::all_of(forms, [](const WeightedForm& w) { return std::isfinite(w.factor); })) {
    RefuseNotFinite();
  }
  CompiledSlot compiled;
  if (std::ranges::none_of(forms, IsFormula)) {
    for (uint32_t place = 0; place < slot.places.size(); ++place) {
      compiled.exchanges.push_back(
          CompileExchange(slot, number, place, forms, is_pristine, compiled.changed));
    }
    return compiled;
  }
  for (const WeightedForm& weighted : forms) {
    compiled.dense.push_back(MakeTerm(weighted.form->fields, weighted.factor));
  }
  constexpr double kSafe = 3e38;  // fp32 ends at 3.4e38; the margin is far above any rounding
  if (!(slot.largest + BoundOf(compiled.dense, slot.largest) < kSafe))
    RequireFinite(slot, compiled.dense);
  // A zero may lose its sign, which no result shows.
  compiled.changed = IsZero(compiled.dense) ? 0 : slot.pristine.shape().size();
  return compiled;
}

}  // namespace edge_lora
