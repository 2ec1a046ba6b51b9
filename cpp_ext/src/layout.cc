#include "layout.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <span>

#include "bytes.h"
#include "status.h"

namespace edge_lora {
namespace {

// Bits of the smallest normal float: values from here on survive any copy, denormals might not.
constexpr uint32_t kFirstProbe = 0x00800000;
constexpr uint64_t kMaxProbe = 0x7f000000;  // values below infinity
constexpr uint32_t kMagic = 0x4c594c45;     // "ELYL"
// An engine pads to some tile; a file that claims more is wrong.
constexpr uint64_t kMaxPadding = 64;

[[noreturn]] void Refuse(const std::string& reason) {
  throw Error(Code::kUnsupported, "packed layout: " + reason);
}

std::string Text(Shape shape) {
  return "(" + std::to_string(shape.out) + ", " + std::to_string(shape.in) + ")";
}

void RequireAddressable(Shape shape, uint64_t elements) {
  if (shape.in == 0 || shape.out == 0 || shape.in > UINT32_MAX || shape.out > UINT32_MAX ||
      shape.size() > elements || elements > UINT32_MAX) {
    throw Error(Code::kInvalidArgument, "a weight of " + Text(shape) + " does not fit a block of " +
                                            std::to_string(elements) + " values");
  }
}

}  // namespace

Layout::Layout(Shape shape, uint64_t elements) : shape_(shape), elements_(elements) {
  RequireAddressable(shape, elements);
  input_.resize(shape.in);
  class_of_.resize(shape.in);
}

std::shared_ptr<const Layout> Layout::Plain(Shape shape, Stored stored) {
  const std::shared_ptr<Layout> layout(new Layout(shape, shape.size()));
  const bool out_in = stored == Stored::kOutIn;
  const auto in_step = static_cast<uint32_t>(out_in ? 1 : shape.out);
  const auto out_step = static_cast<uint32_t>(out_in ? shape.in : 1);
  layout->outputs_.resize(shape.out);
  for (uint32_t n = 0; n < shape.out; ++n) layout->outputs_[n] = n * out_step;
  for (uint32_t k = 0; k < shape.in; ++k) layout->input_[k] = k * in_step;
  layout->FindLine();
  return layout;
}

void Layout::Offsets(uint64_t k0, uint64_t k1, uint64_t n, uint32_t* offsets) const {
  for (uint64_t k = k0; k < k1;) {  // neighbours are mostly of one class
    const uint8_t shared = class_of_[k];
    const uint32_t output = OutputsOf(k)[n];
    for (; k < k1 && class_of_[k] == shared; ++k) *offsets++ = input_[k] + output;
  }
}

bool Layout::IsPlain(Stored stored) const {
  const uint64_t in_step = stored == Stored::kOutIn ? 1 : shape_.out;
  const uint64_t out_step = stored == Stored::kOutIn ? shape_.in : 1;
  for (uint64_t k = 0; k < shape_.in; ++k) {
    if (input_[k] != k * in_step) return false;
  }
  for (uint64_t i = 0; i < outputs_.size(); ++i) {
    if (outputs_[i] != i % shape_.out * out_step) return false;
  }
  return true;
}

void Layout::ProbeValues(Shape shape, Stored stored, float* out) {
  RequireAddressable(shape, shape.size());
  if (shape.size() > kMaxProbe) Refuse(Text(shape) + " has too many values to probe");
  const auto bits = [&shape](uint64_t k, uint64_t n) {
    return std::bit_cast<float>(static_cast<uint32_t>(kFirstProbe + n * shape.in + k));
  };
  if (stored == Stored::kOutIn) {
    for (uint64_t n = 0; n < shape.out; ++n) {
      for (uint64_t k = 0; k < shape.in; ++k) *out++ = bits(k, n);
    }
  } else {
    for (uint64_t k = 0; k < shape.in; ++k) {
      for (uint64_t n = 0; n < shape.out; ++n) *out++ = bits(k, n);
    }
  }
}

std::shared_ptr<const Layout> Layout::FromProbe(const float* block, uint64_t elements,
                                                Shape shape) {
  const std::shared_ptr<Layout> layout(new Layout(shape, elements));
  constexpr uint32_t kMissing = UINT32_MAX;
  std::vector<uint32_t> place(shape.size(), kMissing);  // (in, out)
  for (uint64_t i = 0; i < elements; ++i) {
    const uint32_t name = std::bit_cast<uint32_t>(block[i]) - kFirstProbe;
    if (name >= shape.size()) continue;  // padding
    uint32_t& found = place[name % shape.in * shape.out + name / shape.in];
    if (found != kMissing) {
      // XNNPACK fills its last panel with copies of the last output, behind it: padding as well.
      if (name / shape.in + 1 == shape.out) continue;
      Refuse("a value of " + Text(shape) + " lies in two places");
    }
    found = static_cast<uint32_t>(i);
  }
  if (std::ranges::find(place, kMissing) != place.end()) {
    Refuse("values of " + Text(shape) + " are missing: the engine does not keep them as they are");
  }
  std::vector<uint32_t> relative(shape.out);
  for (uint64_t k = 0; k < shape.in; ++k) {
    const uint32_t* row = place.data() + k * shape.out;
    for (uint64_t n = 0; n < shape.out; ++n) relative[n] = row[n] - row[0];
    layout->AddInput(k, row[0], relative.data());
  }
  layout->FindLine();
  return layout;
}

void Layout::AddInput(uint64_t k, uint32_t first, const uint32_t* outputs) {
  const size_t classes = outputs_.size() / shape_.out;
  // Neighbours are mostly of one class: look from the latest back.
  size_t found = classes;
  for (size_t c = classes; c-- > 0 && found == classes;) {
    if (std::equal(outputs, outputs + shape_.out, outputs_.data() + c * shape_.out)) found = c;
  }
  if (found == classes) {
    if (classes == kMaxClasses) Refuse(Text(shape_) + " is too irregular");
    outputs_.insert(outputs_.end(), outputs, outputs + shape_.out);
  }
  input_[k] = first;
  class_of_[k] = static_cast<uint8_t>(found);
}

void Layout::FindLine() {
  // Lines start at multiples of this; the last one may be short, so `out` itself does not count.
  uint64_t breaks = 0;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const uint64_t n = i % shape_.out;
    if (n > 0 && outputs_[i] != outputs_[i - 1] + 1) breaks = std::gcd(breaks, n);
  }
  line_ = breaks == 0 ? shape_.out : breaks;
}

void Layout::RequireInjective() const {
  std::vector<bool> taken(elements_);
  for (uint64_t k = 0; k < shape_.in; ++k) {
    for (uint64_t n = 0; n < shape_.out; ++n) {
      const uint32_t offset = Offset(k, n);
      if (offset >= elements_ || taken[offset]) {
        throw Error(Code::kInvalidArgument, "a saved layout is damaged: probe it again");
      }
      taken[offset] = true;
    }
  }
}

std::string Layout::ToBytes() const {
  ByteWriter out;
  out.Put(kMagic);
  out.Put(shape_.out);
  out.Put(shape_.in);
  out.Put(elements_);
  out.PutAll(input_);
  out.PutAll(class_of_);
  out.PutAll(outputs_);
  return out.Take();
}

std::shared_ptr<const Layout> Layout::FromBytes(const std::string& bytes) {
  ByteReader in(bytes, "a saved layout");
  if (in.Get<uint32_t>() != kMagic) in.Refuse();
  const auto out_features = in.Get<uint64_t>();
  const Shape shape{out_features, in.Get<uint64_t>()};
  const auto elements = in.Get<uint64_t>();
  if (shape.in > bytes.size() || shape.out > bytes.size() ||
      elements / kMaxPadding > shape.size()) {
    in.Refuse();
  }
  const std::shared_ptr<Layout> layout(new Layout(shape, elements));
  layout->input_ = in.GetAll<uint32_t>();
  layout->class_of_ = in.GetAll<uint8_t>();
  layout->outputs_ = in.GetAll<uint32_t>();
  in.RequireEnd();
  const size_t classes = layout->outputs_.size() / shape.out;
  if (layout->input_.size() != shape.in || layout->class_of_.size() != shape.in ||
      classes * shape.out != layout->outputs_.size() || classes > kMaxClasses ||
      std::ranges::any_of(layout->class_of_, [classes](uint8_t c) { return c >= classes; })) {
    in.Refuse();
  }
  layout->RequireInjective();
  layout->FindLine();
  return layout;
}

}  // namespace edge_lora
