#include "adapter_file.h"

#include <random>

#include "adapter_writer.h"
#include "check.h"
#include "low_rank.h"

using namespace edge_lora;

namespace {

std::string SoundAdapter() {
  AdapterWriter writer;
  writer.Add("w/0/A", "F32", "2,3", BytesOf(std::vector<float>{1, 2, 3, 4, 5, 6}));
  writer.Add("w/0/Bt", "F32", "2,2", BytesOf(std::vector<float>{1, 2, 3, 4}));
  writer.Add("w/1/idx", "U8", "2", std::string("\x02\x03", 2));  // remainders 0, 1; two ones
  writer.Add("w/1/val", "F32", "2", BytesOf(std::vector<float>{7, 8}));
  return writer.Finish(
      R"({"w":{"shape":[2,3],"dtype":"F32","forms":[{"form":"low_rank","scale":2.0},)"
      R"({"form":"sparse","mode":"add","scale":1.0,"index":"rice","k":1}]}})",
      0.5);
}

}  // namespace

int main() {
  const std::string path = TestPath("adapter");
  const std::string sound = SoundAdapter();
  const auto adapter = AdapterFile::Open(WriteTo(path, sound));
  CHECK(adapter->alpha() == 0.5);
  CHECK(adapter->deltas().size() == 1 && adapter->deltas()[0].forms.size() == 2);
  CHECK(adapter->Find("w") == adapter->deltas().data() && adapter->Find("v") == nullptr);
  const auto& sparse = std::get<Sparse>(adapter->deltas()[0].forms[1].fields);
  CHECK((sparse.indices == std::vector<uint32_t>{0, 2}));
  StackedLowRank stacked;
  CHECK(!StackLowRank(*adapter, "w", stacked));

  // Any cut and any flipped bit is refused, and never crashes (run under ASan too). The flip of a
  // header byte may be harmless: a letter of a name.
  for (size_t i = 0; i < sound.size(); ++i) {
    WriteTo(path, sound.substr(0, i));
    CHECK(!MessageOf([&] { AdapterFile::Open(path); }).empty());
  }
  const size_t data_bytes = 6 * 4 + 4 * 4 + 2 + 2 * 4;
  for (size_t i = 0; i < sound.size(); ++i) {
    for (const int bit : {1, 8, 128}) {
      std::string flipped = sound;
      flipped[i] = static_cast<char>(flipped[i] ^ bit);
      WriteTo(path, flipped);
      const std::string message = MessageOf([&] { AdapterFile::Open(path); });
      if (i >= sound.size() - data_bytes) CHECK(Has(message, "sha256"));
    }
  }
  CHECK(Has(MessageOf([] { AdapterFile::Open("/dev/null"); }), "not a plain file"));
  CHECK(Has(MessageOf([] { AdapterFile::Open("/nowhere"); }), "/nowhere"));
  unlink(path.c_str());
}
