#include "form_reader.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <span>
#include <string_view>

#include "index_codec.h"
#include "status.h"

namespace edge_lora {
namespace {

constexpr uint64_t kMaxElements = uint64_t{1} << 32;  // an index is a uint32
constexpr size_t kMaxAxes = 8;
constexpr uint64_t kMaxRank = uint64_t{1} << 16;  // above it, factors are no smaller than a weight
constexpr size_t kMaxLevels = 256;

using Axes = std::vector<uint64_t>;

[[noreturn]] void Refuse(const std::string& reason) { throw Error(Code::kAdapterFile, reason); }

std::string TextOf(const Axes& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

std::string TextOf(const Tensor& tensor) {
  return NameOf(tensor.dtype) + (" " + TextOf(tensor.shape));
}

std::string ChoiceIn(const Json& head, const char* key,
                     std::initializer_list<std::string_view> known) {
  const std::string value = TextIn(head, key);
  if (std::ranges::find(known, value) != known.end()) return value;
  std::string all;
  for (const std::string_view name : known) {
    all += (all.empty() ? "'" : ", '") + std::string(name) + "'";
  }
  Refuse("unknown " + std::string(key) + " '" + value + "'; known: " + all);
}

void RequireAscending(const std::vector<uint32_t>& indices, uint64_t limit) {
  for (size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] >= limit) {
      Refuse("index " + std::to_string(indices[i]) + " is out of range, slot has " +
             std::to_string(limit) + " positions");
    }
    if (i > 0 && indices[i] <= indices[i - 1]) {
      Refuse("indices are not strictly ascending (unsorted or duplicated)");
    }
  }
}

/// Makes the ranks of a nested adapter; both lists are empty if it is none.
void ReadRanks(const Json& head, LowRank& form) {
  if (head.contains("ranks")) {
    uint64_t last = 0;
    for (const Json& rank : ArrayIn(head, "ranks")) {
      const uint64_t next = Natural(rank, "ranks");
      if (next <= last || next > form.rank) {
        Refuse("ranks must ascend from 1 to " + std::to_string(form.rank));
      }
      form.ranks.push_back(static_cast<uint32_t>(last = next));
    }
    if (!form.ranks.empty() && last != form.rank) {
      Refuse("ranks must ascend from 1 to " + std::to_string(form.rank));
    }
  }
  if (head.contains("rank_scale")) {
    for (const Json& scale : ArrayIn(head, "rank_scale")) {
      if (!scale.is_number()) Refuse("rank_scale must be numbers");
      form.rank_scale.push_back(scale.get<double>());
    }
  }
  if (form.rank_scale.size() != form.ranks.size()) {
    Refuse(std::to_string(form.rank_scale.size()) + " numbers in rank_scale for " +
           std::to_string(form.ranks.size()) + " ranks");
  }
}

/// How many consecutive ones of `count` values of that shape share their statistics; at least 1.
uint64_t GroupSize(const Codebook& codebook, const Axes& shape, uint64_t count) {
  switch (codebook.group) {
    case Codebook::Group::kTensor:
      return std::max<uint64_t>(count, 1);
    case Codebook::Group::kRow:
      return shape.empty() ? 1 : std::max<uint64_t>(shape.back(), 1);
    default:
      return codebook.count;
  }
}

/// Reads one form of a slot.
class FormReader {
 public:
  FormReader(const Json& head, std::string prefix, const Axes& axes, Shape shape,
             const std::vector<Codebook>& books, Tensors& tensors)
      : head_(head),
        prefix_(std::move(prefix)),
        axes_(axes),
        shape_(shape),
        books_(books),
        tensors_(tensors) {}

  Form Read() {
    if (!head_.is_object()) Refuse("is not an object");
    Form form;
    const std::string kind = ChoiceIn(
        head_, "form", {"block", "bottleneck", "dense", "low_rank", "row_scale", "sparse"});
    form.scale = NumberIn(head_, "scale");
    if (head_.contains("enc")) {
      for (const auto& entry : ObjectIn(head_, "enc").items()) encoded_.insert(entry.key());
    }
    if (kind == "sparse" || kind == "block" || kind == "dense") {
      form.replaces = ChoiceIn(head_, "mode", {"add", "set"}) == "set";
      if (form.replaces && form.scale != 1.0) Refuse("scale must be 1.0 for mode 'set'");
    }
    if (kind == "low_rank") form.fields = ReadLowRank();
    if (kind == "sparse") form.fields = ReadSparse();
    if (kind == "block") form.fields = ReadBlock();
    if (kind == "dense") form.fields = ReadDense();
    if (kind == "row_scale") form.fields = ReadRowScale();
    if (kind == "bottleneck") form.fields = ReadBottleneck();
    if (!encoded_.empty()) Refuse("enc names '" + *encoded_.begin() + "', no values of this form");
    return form;
  }

 private:
  /// Values, plain or coded, and the shape that they have.
  struct Field {
    Axes shape;
    Values values;
  };

  Field Take(const std::string& key) {
    const Tensor& tensor = tensors_.Take(prefix_ + key);
    if (encoded_.erase(key) != 0) return TakeCoded(key, tensor, head_["enc"][key]);
    if (!IsFloat(tensor.dtype)) {
      Refuse(key + " is " + TextOf(tensor) + ", must be fp32, fp16 or bf16");
    }
    if (!AllFinite(tensor.values())) Refuse(key + " holds NaN or infinity");
    return {tensor.shape, tensor.values()};
  }

  Values Take(const std::string& key, const Axes& wanted) {
    const Field field = Take(key);
    if (field.shape != wanted) {
      Refuse(key + " is " + TextOf(field.shape) + ", must be " + TextOf(wanted));
    }
    return field.values;
  }

  /// The tensor holds the statistics, then the codes. Nothing is computed from a size that the file
  /// merely claims before it is known to fit the bytes that are there.
  Field TakeCoded(const std::string& key, const Tensor& tensor, const Json& encoding) const {
    if (tensor.dtype != Dtype::kU8 || tensor.shape.size() != 1) {
      Refuse(key + " is " + TextOf(tensor) + ", coded values are one axis of uint8");
    }
    if (!encoding.is_array() || encoding.empty() || encoding.size() > kMaxAxes + 1) {
      Refuse("enc of " + key + " must be [codebook, shape ...]");
    }
    const uint64_t which = Natural(encoding[0], "enc of " + key);
    if (which >= books_.size()) {
      Refuse(key + " has codebook " + std::to_string(which) + ", the file has " +
             std::to_string(books_.size()));
    }
    Field field;
    uint64_t count = 1;
    bool fits = true;
    for (size_t i = 1; i < encoding.size(); ++i) {
      field.shape.push_back(Natural(encoding[i], "enc of " + key));
      fits = !__builtin_mul_overflow(count, field.shape.back(), &count) && fits;
    }
    fits = fits && count <= kMaxElements;
    const Codebook& codebook = books_[which];
    const Coding coding{codebook.book, GroupSize(codebook, field.shape, count), tensor.data};
    Values& values = field.values;
    values = {Dtype::kU8, nullptr, count, coding};
    if (!fits || count / 8 > tensor.count || values.bytes() != tensor.count) {
      Refuse(key + " has " + std::to_string(tensor.count) +
             " bytes, which are not the statistics " + "and codes of " + TextOf(field.shape));
    }
    values.data = tensor.data + values.stats_bytes();
    if (!AllFinite(values)) {
      Refuse(key + " has a mean, spread or level that is NaN, infinite or negative");
    }
    if (!HasCleanPadding(values.coding, values.data, count)) {
      Refuse(key + " has padding bits that are set");
    }
    return field;
  }

  LowRank ReadLowRank() {
    LowRank form;
    const Field a = Take("A");
    const uint64_t rank = a.shape.empty() ? 0 : a.shape[0];
    if (rank == 0 || rank > kMaxRank) {
      Refuse("rank is " + std::to_string(rank) + ", must be 1 to " + std::to_string(kMaxRank));
    }
    if (a.shape != Axes{rank, shape_.in}) {
      Refuse("A is " + TextOf(a.shape) + ", must be " + TextOf(Axes{rank, shape_.in}));
    }
    form.rank = static_cast<uint32_t>(rank);
    form.a = a.values;
    form.bt = Take("Bt", {rank, shape_.out});
    ReadRanks(head_, form);
    return form;
  }

  Sparse ReadSparse() {
    const Field values = Take("val");
    if (values.shape.size() != 1) Refuse("val is " + TextOf(values.shape) + ", must have one axis");
    return {ReadIndices(values.values.count), values.values};
  }

  std::vector<uint32_t> ReadIndices(uint64_t count) {
    const Tensor& stream = tensors_.Take(prefix_ + "idx");
    if (stream.dtype != Dtype::kU8 || stream.shape.size() != 1) {
      Refuse("idx is " + TextOf(stream) + ", must be a uint8 stream");
    }
    const std::span bytes(stream.data, stream.count);
    const std::string coding = ChoiceIn(head_, "index", {"rice", "line16"});
    const int64_t k = IntegerIn(head_, "k");
    if (coding == "rice") return RiceDecode(bytes, count, k, shape_.size());
    if (shape_.out % kFileLine != 0 || count % kFileLine != 0) {
      Refuse("line16 indices need multiples of 16, found " + std::to_string(shape_.out) +
             " outputs and " + std::to_string(count) + " values");
    }
    const auto lines = RiceDecode(bytes, count / kFileLine, k, shape_.size() / kFileLine);
    return ExpandLines(lines, shape_.in);
  }

  Block ReadBlock() {
    Block block;
    block.rows = ChoiceIn(head_, "axis", {"row", "col"}) == "row";
    const Tensor& idx = tensors_.Take(prefix_ + "idx");
    if (idx.dtype != Dtype::kU32 || idx.shape.size() != 1) {
      Refuse("idx is " + TextOf(idx) + ", must be uint32 (k,)");
    }
    block.values = Take("val", {idx.count, block.rows ? shape_.in : shape_.out});
    block.indices.resize(idx.count);
    if (idx.count != 0) std::memcpy(block.indices.data(), idx.data, idx.bytes());
    RequireAscending(block.indices, block.rows ? shape_.out : shape_.in);
    return block;
  }

  /// Plain values may have another shape with as many values: they lie alike.
  Dense ReadDense() {
    const Field field = Take("val");
    const bool fits =
        field.values.is_coded() ? field.shape == axes_ : field.values.count == shape_.size();
    if (!fits) Refuse("val is " + TextOf(field.shape) + ", slot is " + TextOf(axes_));
    return {field.values};
  }

  RowScale ReadRowScale() {
    const bool rows = ChoiceIn(head_, "axis", {"row", "col"}) == "row";
    return {rows, Take("val", {rows ? shape_.out : shape_.in})};
  }

  Bottleneck ReadBottleneck() {
    ChoiceIn(head_, "act", {"none", "relu", "gelu", "gelu_tanh"});
    const bool parallel = ChoiceIn(head_, "placement", {"parallel", "sequential"}) == "parallel";
    const Field down = Take("down");
    const uint64_t rank = down.shape.empty() ? 0 : down.shape[0];
    if (rank == 0) Refuse("rank is 0");
    const Axes wanted = {rank, parallel ? shape_.in : shape_.out};
    if (down.shape != wanted) {
      Refuse("down is " + TextOf(down.shape) + ", must be " + TextOf(wanted));
    }
    Take("up", {shape_.out, rank});
    if (tensors_.Has(prefix_ + "down_b")) Take("down_b", {rank});
    if (tensors_.Has(prefix_ + "up_b")) Take("up_b", {shape_.out});
    return {};
  }

  const Json& head_;
  const std::string prefix_;
  const Axes& axes_;
  const Shape shape_;
  const std::vector<Codebook>& books_;
  Tensors& tensors_;
  std::set<std::string> encoded_;  // names in enc whose values were not taken yet
};

Axes ReadAxes(const Json& entry) {
  const Json& axes = ArrayIn(entry, "shape");
  if (axes.size() > kMaxAxes) Refuse("more than 8 axes");
  Axes found;
  uint64_t size = 1;
  for (const Json& axis : axes) {
    found.push_back(Natural(axis, "shape"));
    if (found.back() == 0 || __builtin_mul_overflow(size, found.back(), &size) ||
        size > kMaxElements) {
      Refuse("a slot has 1 to 2^32 values, its shape says otherwise");
    }
  }
  return found;
}

Shape ShapeOf(const Axes& axes) {
  Shape shape{1, 1};
  for (size_t i = 0; i < axes.size(); ++i) (i == 0 ? shape.out : shape.in) *= axes[i];
  return shape;
}

Codebook ReadCodebook(const Json& head) {
  if (!head.is_object()) Refuse("is not an object");
  const Json& levels = ArrayIn(head, "book");
  if (levels.size() > kMaxLevels || !std::ranges::all_of(levels, &Json::is_number)) {
    Refuse("its book is not 2 to 256 numbers");
  }
  std::vector<float> book;
  for (const Json& level : levels) book.push_back(static_cast<float>(level.get<double>()));
  if (!IsSoundBook(book)) {
    Refuse("its book is not 2, 4, 16 or 256 levels that are finite and ascend");
  }
  Codebook codebook;
  codebook.book = std::make_shared<const std::vector<float>>(std::move(book));
  const Json& group = Member(head, "group");
  if (group == "row") codebook.group = Codebook::Group::kRow;
  if (group == "tensor" || group == "row") return codebook;
  codebook.group = Codebook::Group::kCount;
  codebook.count = Natural(group, "group");
  if (codebook.count == 0 || codebook.count > UINT32_MAX) {
    Refuse("its group is " + group.dump() + ", must be 'tensor', 'row' or from 1");
  }
  return codebook;
}

}  // namespace

const Tensor& Tensors::Take(const std::string& name) {
  const auto found = all_.find(name);
  if (found == all_.end()) Refuse("tensor '" + name + "' is missing");
  taken_.insert(name);
  return found->second;
}

std::vector<std::string> Tensors::Rest() const {
  std::vector<std::string> rest;
  for (const auto& entry : all_) {
    if (!taken_.contains(entry.first)) rest.push_back(entry.first);
  }
  return rest;
}

std::vector<Codebook> ReadCodebooks(const Json& header) {
  std::vector<Codebook> books;
  if (!header.contains("codebooks")) return books;
  for (const Json& head : ArrayIn(header, "codebooks")) {
    try {
      books.push_back(ReadCodebook(head));
    } catch (const Error& error) {
      Refuse("codebook " + std::to_string(books.size()) + ": " + error.what());
    }
  }
  return books;
}

Delta ReadDelta(const std::string& slot, const Json& entry, const std::vector<Codebook>& books,
                Tensors& tensors, std::vector<std::string>& problems) {
  if (!entry.is_object()) Refuse("is not an object");
  const Axes axes = ReadAxes(entry);
  Delta delta{slot, ShapeOf(axes), {}};
  if (entry.contains("dtype")) TextIn(entry, "dtype");
  if (entry.contains("hash")) TextIn(entry, "hash");
  const Json& heads = ArrayIn(entry, "forms");
  if (heads.empty()) Refuse("no forms");
  size_t bottlenecks = 0;
  for (size_t i = 0; i < heads.size(); ++i) {
    try {
      const std::string prefix = slot + "/" + std::to_string(i) + "/";
      FormReader reader(heads[i], prefix, axes, delta.shape, books, tensors);
      delta.forms.push_back(reader.Read());
      bottlenecks += std::holds_alternative<Bottleneck>(delta.forms.back().fields) ? 1 : 0;
    } catch (const Error& error) {
      problems.push_back(slot + ": form " + std::to_string(i) + ": " + error.what());
    }
  }
  if (heads.size() > 1 && std::ranges::any_of(delta.forms, &Form::replaces)) {
    Refuse("a form with mode 'set' must stand alone");
  }
  if (bottlenecks != 0 && bottlenecks != delta.forms.size()) {
    Refuse("a bottleneck stands at a site, other forms at a weight");
  }
  return delta;
}

}  // namespace edge_lora
