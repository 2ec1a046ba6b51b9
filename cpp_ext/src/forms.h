// What an adapter does to a slot; twin of edge_lora/forms.py. What each form means: reference.py.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "values.h"

namespace edge_lora {

/// (out_features, in_features) of a slot; a convolution has the rest of its axes flattened into in.
struct Shape {
  uint64_t out = 0;
  uint64_t in = 0;

  bool operator==(const Shape&) const = default;
  uint64_t size() const { return out * in; }
};

/// Delta scale * (b @ a). The file holds b transposed.
struct LowRank {
  uint32_t rank = 0;
  Values a;                          // (rank, in)
  Values bt;                         // (rank, out)
  std::vector<uint32_t> ranks = {};  // at which it works too, ascending to rank; empty: only whole
  std::vector<double> rank_scale = {};  // the scale at each of them
};

/// Few entries, at flat row-major positions in (out, in), strictly ascending.
struct Sparse {
  std::vector<uint32_t> indices;  // (nnz)
  Values values;                  // (nnz)
};

/// Whole rows (outputs) or whole columns (inputs), strictly ascending.
struct Block {
  bool rows = false;
  std::vector<uint32_t> indices;  // (k)
  Values values;                  // (k, in) for rows, (k, out) for columns
};

/// Every entry.
struct Dense {
  Values values;  // (out, in)
};

/// Every row or column of the base's weight, times a number of its own.
struct RowScale {
  bool rows = false;
  Values values;  // (out) for rows, (in) for columns
};

/// A small network beside a site. It changes no weight: the core checks it and leaves it alone.
struct Bottleneck {};

using Fields = std::variant<LowRank, Sparse, Block, Dense, RowScale, Bottleneck>;

/// Calls visit(values) for each value field of a form.
template <typename AnyFields, typename Visit>
void ForEachValues(AnyFields& fields, const Visit& visit) {
  const auto visit_form = [&](auto& form) {
    if constexpr (requires { form.bt; }) {
      visit(form.a);
      visit(form.bt);
    } else if constexpr (requires { form.values; }) {
      visit(form.values);
    }
  };
  std::visit(visit_form, fields);
}

/// The indices of a form; empty if it has none.
inline std::span<const uint32_t> IndicesOf(const Fields& fields) {
  if (const auto* sparse = std::get_if<Sparse>(&fields)) return sparse->indices;
  if (const auto* block = std::get_if<Block>(&fields)) return block->indices;
  return {};
}

struct Form {
  Fields fields;
  double scale = 1.0;
  bool replaces = false;  ///< Mode "set".
};

/// The forms that the adapter has for one slot; they add up.
struct Delta {
  std::string slot;
  Shape shape;
  std::vector<Form> forms;
};

}  // namespace edge_lora
