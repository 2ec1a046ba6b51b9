#include "layout.h"

#include "check.h"
#include "layouts.h"

using namespace edge_lora;

namespace {

void CheckPanels(Shape shape) {
  const auto layout = PanelLayout(shape);
  CHECK(layout->elements() == PanelElements(shape));
  CHECK(layout->line() == (shape.out <= 16 || shape.in == 1 ? shape.out : 16));
  const auto again = Layout::FromBytes(layout->ToBytes());
  CHECK(again->line() == layout->line() && again->elements() == layout->elements());
  for (uint64_t k = 0; k < shape.in; ++k) {
    for (uint64_t n = 0; n < shape.out; ++n) {
      CHECK(layout->Offset(k, n) == PanelOffset(k, n, shape));
      CHECK(again->Offset(k, n) == layout->Offset(k, n));
    }
  }
}

void CheckPlain(Shape shape) {
  const auto oi = Layout::Plain(shape, Stored::kOutIn);
  const auto io = Layout::Plain(shape, Stored::kInOut);
  for (uint64_t k = 0; k < shape.in; ++k) {
    for (uint64_t n = 0; n < shape.out; ++n) {
      CHECK(oi->Offset(k, n) == n * shape.in + k);
      CHECK(io->Offset(k, n) == k * shape.out + n);
    }
  }
  CHECK(io->line() == shape.out);
  CHECK(oi->line() == (shape.in == 1 ? shape.out : 1));
  // What a file says is not believed: every cut and every flipped byte is refused or harmless.
  const std::string bytes = oi->ToBytes();
  for (size_t i = 0; i < bytes.size(); ++i) {
    CHECK(!MessageOf([&] { Layout::FromBytes(bytes.substr(0, i)); }).empty());
    std::string flipped = bytes;
    flipped[i] = static_cast<char>(flipped[i] ^ 0x41);
    MessageOf([&] { Layout::FromBytes(flipped); });
  }
}

}  // namespace

int main() {
  for (const uint64_t out : {1U, 15U, 16U, 17U, 32U, 40U}) {
    for (const uint64_t in : {1U, 255U, 256U, 257U, 600U}) CheckPanels({out, in});
  }
  for (const Shape shape : {Shape{1, 1}, Shape{5, 3}, Shape{16, 2}}) CheckPlain(shape);

  std::vector<float> values(6);
  Layout::ProbeValues({2, 3}, Stored::kInOut, values.data());
  auto doubled = values;
  doubled[1] = doubled[0];
  CHECK(Has(MessageOf([&] { Layout::FromProbe(doubled.data(), 6, {2, 3}); }), "two places"));
  // Copies of the last output are padding; the first one is it.
  std::vector<float> padded(8);
  Layout::ProbeValues({2, 3}, Stored::kInOut, padded.data());
  padded[6] = padded[7] = padded[5];
  CHECK(Layout::FromProbe(padded.data(), 8, {2, 3})->Offset(2, 1) == 5);
  values[2] = 0;
  CHECK(Has(MessageOf([&] { Layout::FromProbe(values.data(), 6, {2, 3}); }), "missing"));
  CHECK(!MessageOf([&] { Layout::Plain({0, 3}, Stored::kOutIn); }).empty());
  CHECK(!MessageOf([&] { Layout::Plain({1 << 17, 1 << 17}, Stored::kOutIn); }).empty());
}
