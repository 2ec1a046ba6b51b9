#include "patch_file.h"

#include <algorithm>
#include <cmath>

#include "bytes.h"
#include "file.h"
#include "sha256.h"

namespace edge_lora {
namespace {

constexpr uint64_t kMagic = 0x3248435441504c45;  // "ELPATCH2"
constexpr size_t kDigestBytes = 64;              // hex

enum class Kind : uint8_t { kLowRank, kSparse, kBlock, kDense, kRowScale };

void Put(ByteWriter& out, const std::string& text) { out.PutAll(text); }

void Put(ByteWriter& out, const std::byte* bytes, size_t count) {
  out.PutAll(std::string_view(reinterpret_cast<const char*>(bytes), count));
}

void Put(ByteWriter& out, const Values& values) {
  out.Put(values.dtype);
  if (values.is_coded()) {
    out.PutAll(*values.coding.book);
    out.Put(values.coding.group);
    Put(out, values.coding.stats, values.stats_bytes());
  }
  Put(out, values.data, values.data_bytes());
}

void Put(ByteWriter& out, const Term& term) {
  out.Put(static_cast<Kind>(term.fields.index()));
  out.Put(term.factor);
  if (const auto* low_rank = std::get_if<LowRank>(&term.fields)) {
    out.Put(low_rank->rank);
    Put(out, low_rank->a);
    Put(out, low_rank->bt);
  } else if (const auto* sparse = std::get_if<Sparse>(&term.fields)) {
    out.PutAll(sparse->indices);
    Put(out, sparse->values);
  } else if (const auto* block = std::get_if<Block>(&term.fields)) {
    out.Put(block->rows);
    out.PutAll(block->indices);
    Put(out, block->values);
  } else if (const auto* row_scale = std::get_if<RowScale>(&term.fields)) {
    out.Put(row_scale->rows);
    Put(out, row_scale->values);
  } else {
    Put(out, std::get<Dense>(term.fields).values);
  }
}

/// Reads one saved patch; every method refuses what does not fit the slot.
class Reader {
 public:
  Reader(const std::string& bytes, const std::string& what, const std::vector<Slot>& slots)
      : in_(bytes, what), slots_(slots) {}

  void Read(Patch& patch, const std::string& signature) {
    if (in_.Get<uint64_t>() != kMagic) in_.Refuse();
    patch.signature = Text();
    if (patch.signature != signature) {
      throw Error(Code::kInvalidArgument, "the saved patch was made for another image");
    }
    patch.changed = in_.Get<uint64_t>();
    for (auto count = in_.Get<uint64_t>(); count > 0; --count) {
      patch.exchanges.push_back(Exchange());
    }
    for (auto count = in_.Get<uint64_t>(); count > 0; --count) patch.denses.push_back(Dense());
    in_.RequireEnd();
    NameSlots(patch);
  }

 private:
  std::string Text() {
    const auto text = in_.GetAll<char>();
    return {text.begin(), text.end()};
  }

  void Require(bool fact) const {
    if (!fact) in_.Refuse();
  }

  ExchangePart Exchange() {
    ExchangePart part;
    part.slot = in_.Get<uint32_t>();
    part.place = in_.Get<uint32_t>();
    part.run = in_.Get<uint32_t>();
    part.offsets = in_.GetAll<uint32_t>();
    part.values = in_.GetAll<float>();
    Require(part.slot < slots_.size() && part.place < slots_[part.slot].places.size());
    Require(part.run == 1 || part.run == 8 || part.run == 16);
    Require(part.values.size() == part.offsets.size() * part.run);
    const uint64_t elements = slots_[part.slot].places[part.place].layout->elements();
    uint64_t next = 0;
    for (const uint32_t offset : part.offsets) {
      Require(offset >= next);
      next = uint64_t{offset} + part.run;
    }
    Require(next <= elements);
    Require(std::ranges::all_of(part.values, [](float v) { return std::isfinite(v); }));
    return part;
  }

  DensePart Dense() {
    DensePart part;
    part.slot = in_.Get<uint32_t>();
    Require(part.slot < slots_.size() && !slots_[part.slot].places.empty());
    const Shape shape = slots_[part.slot].pristine.shape();
    for (auto count = in_.Get<uint64_t>(); count > 0; --count) {
      part.terms.push_back(ReadTerm(shape));
    }
    Require(!part.terms.empty());
    return part;
  }

  /// The bytes are held by `held_` until MakeTerm has copied them.
  const std::byte* ReadBytes(uint64_t wanted) {
    const auto& bytes = held_.emplace_back(in_.GetAll<std::byte>());
    Require(bytes.size() == wanted);
    return bytes.data();
  }

  /// Nothing is computed from `count` before it is known not to exceed what codes of one bit hold.
  Values ReadValues(uint64_t count) {
    Values values{in_.Get<Dtype>(), nullptr, count};
    Require(count / 8 <= in_.left());
    if (values.dtype == Dtype::kU8) {
      values.coding = ReadCoding(count);
    } else {
      Require(IsFloat(values.dtype));
    }
    values.data = ReadBytes(values.data_bytes());
    Require(AllFinite(values));
    return values;
  }

  Coding ReadCoding(uint64_t count) {
    auto levels = in_.GetAll<float>();
    Require(IsSoundBook(levels));
    Coding coding;
    coding.book = Shared(std::move(levels));
    coding.group = in_.Get<uint64_t>();
    Require(coding.group > 0);
    coding.stats = ReadBytes(coding.stats_bytes(count));
    Require(HasSoundStats(coding, count));
    return coding;
  }

  /// One copy of a book for all that is coded with it.
  Book Shared(std::vector<float> levels) {
    const auto same = [&](const Book& book) { return *book == levels; };
    const auto found = std::ranges::find_if(books_, same);
    if (found != books_.end()) return *found;
    return books_.emplace_back(std::make_shared<const std::vector<float>>(std::move(levels)));
  }

  std::vector<uint32_t> ReadIndices(uint64_t limit) {
    auto indices = in_.GetAll<uint32_t>();
    uint64_t next = 0;
    for (const uint32_t index : indices) {
      Require(index >= next);
      next = uint64_t{index} + 1;
    }
    Require(next <= limit);
    return indices;
  }

  Term ReadTerm(Shape shape) {
    held_.clear();
    const auto kind = in_.Get<Kind>();
    const auto factor = in_.Get<float>();
    Require(std::isfinite(factor));
    switch (kind) {
      case Kind::kLowRank: {
        LowRank low_rank;
        low_rank.rank = in_.Get<uint32_t>();
        Require(low_rank.rank > 0);
        low_rank.a = ReadValues(low_rank.rank * shape.in);
        low_rank.bt = ReadValues(low_rank.rank * shape.out);
        return MakeTerm(low_rank, factor);
      }
      case Kind::kSparse: {
        Sparse sparse;
        sparse.indices = ReadIndices(shape.size());
        sparse.values = ReadValues(sparse.indices.size());
        return MakeTerm(sparse, factor);
      }
      case Kind::kBlock: {
        Block block;
        block.rows = in_.Get<uint8_t>() != 0;
        block.indices = ReadIndices(block.rows ? shape.out : shape.in);
        block.values = ReadValues(block.indices.size() * (block.rows ? shape.in : shape.out));
        return MakeTerm(block, factor);
      }
      case Kind::kRowScale: {
        RowScale row_scale;
        row_scale.rows = in_.Get<uint8_t>() != 0;
        row_scale.values = ReadValues(row_scale.rows ? shape.out : shape.in);
        return MakeTerm(row_scale, factor);
      }
      case Kind::kDense:
        return MakeTerm(edge_lora::Dense{ReadValues(shape.size())}, factor);
      default:
        in_.Refuse();
    }
  }

  /// Fills in the names; a slot is patched in one way, and in all its places or none.
  void NameSlots(Patch& patch) const {
    std::map<uint32_t, std::set<uint32_t>> places;
    for (const ExchangePart& part : patch.exchanges) {
      Require(places[part.slot].insert(part.place).second);
    }
    for (const auto& [slot, found] : places) Require(found.size() == slots_[slot].places.size());
    for (const DensePart& part : patch.denses) Require(places.try_emplace(part.slot).second);
    for (const auto& entry : places) patch.slots.push_back(slots_[entry.first].name);
  }

  ByteReader in_;
  const std::vector<Slot>& slots_;
  std::vector<std::vector<std::byte>> held_;
  std::vector<Book> books_;
};

}  // namespace

void SavePatch(Patch& patch, const std::string& path) {
  const std::scoped_lock hold(patch.mutex);
  if (patch.is_in) {
    throw Error(Code::kUnsupported,
                "a patch that is in holds the base's values: save it before the swap");
  }
  ByteWriter out;
  out.Put(kMagic);
  Put(out, patch.signature);
  out.Put(patch.changed);
  out.Put<uint64_t>(patch.exchanges.size());
  for (const ExchangePart& part : patch.exchanges) {
    out.Put(part.slot);
    out.Put(part.place);
    out.Put(part.run);
    out.PutAll(part.offsets);
    out.PutAll(part.values);
  }
  out.Put<uint64_t>(patch.denses.size());
  for (const DensePart& part : patch.denses) {
    out.Put(part.slot);
    out.Put<uint64_t>(part.terms.size());
    for (const Term& term : part.terms) Put(out, term);
  }
  std::string bytes = out.Take();
  bytes += Sha256Hex(bytes.data(), bytes.size());
  WriteAtomically(path, bytes.data(), bytes.size());
}

std::shared_ptr<Patch> ReadPatch(const std::string& path, const std::vector<Slot>& slots,
                                 const std::string& signature) {
  const File file(path, Code::kInputOutput);
  std::string bytes(file.size(), '\0');
  file.Read(bytes.data(), bytes.size(), 0);
  const std::string what = "saved patch '" + path + "'";
  const size_t body = bytes.size() - std::min(bytes.size(), kDigestBytes);
  const std::string digest = bytes.substr(body);
  bytes.resize(body);
  Reader reader(bytes, what, slots);
  auto patch = std::make_shared<Patch>();
  if (digest != Sha256Hex(bytes.data(), bytes.size())) ByteReader(bytes, what).Refuse();
  reader.Read(*patch, signature);
  return patch;
}

}  // namespace edge_lora
