#include "low_rank.h"

#include "adapter_writer.h"
#include "check.h"
#include "edge_lora/edge_lora.h"

using namespace edge_lora;

namespace {

constexpr char kSlots[] =
    R"({"v":{"shape":[2,3],"dtype":"F32","forms":[{"form":"row_scale","scale":1,"axis":"row"}]},)"
    R"("w":{"shape":[2,3],"dtype":"F32","forms":[{"form":"low_rank","scale":9,)"
    R"("ranks":[1,3],"rank_scale":[4.0,2.0],"enc":{"A":[0,3,3]}}]}})";

/// Rank 3; A is -1 or 1 in codes, one row a group of its own.
std::string Nested() {
  AdapterWriter writer;
  const std::vector<float> stats = {0, 1, 10, 2, 100, 3};  // mean and spread of each row
  writer.Add("v/0/val", "F32", "2", BytesOf(std::vector<float>{1, 2}));
  writer.Add("w/0/A", "U8", "26", BytesOf(stats) + std::string("\xd5\x00", 2));
  writer.Add("w/0/Bt", "F32", "3,2", BytesOf(std::vector<float>{1, 2, 3, 4, 5, 6}));
  return writer.Finish(kSlots, 0.5, R"([{"book":[-1,1],"group":"row"}])");
}

void CheckStack(const AdapterFile& adapter, const std::vector<float>& a,
                const std::vector<float>& b) {
  StackedLowRank stacked;
  CHECK(StackLowRank(adapter, "w", stacked));
  CHECK(stacked.a == a && stacked.b == b);
  CHECK(!StackLowRank(adapter, "v", stacked));
}

}  // namespace

int main() {
  const std::string path = TestPath("nested");
  auto adapter = AdapterFile::Open(WriteTo(path, Nested()));
  // Codes 1 0 1 | 0 1 0 | 1 1 0, the last bit in a byte of its own.
  CheckStack(*adapter, {1, 8, 103, -1, 12, 103, 1, 8, 97}, {4.5, 9, 13.5, 18, 22.5, 27});
  const auto small = adapter->AtRank(1);
  CHECK(adapter->bytes() == small->bytes());  // shared
  adapter = nullptr;
  CheckStack(*small, {1, -1, 1}, {2, 4});
  CheckStack(*small->AtRank(1), {1, -1, 1}, {2, 4});
  CHECK(Has(MessageOf([&] { static_cast<void>(small->AtRank(3)); }), "this adapter: 1"));

  el_adapter* whole = nullptr;
  el_adapter* view = nullptr;
  uint32_t rank = 0;
  uint64_t in = 0;
  uint64_t out = 0;
  CHECK(el_adapter_open(path.c_str(), &whole) == EL_OK);
  CHECK(el_adapter_at_rank(whole, 2, &view) == EL_UNSUPPORTED && view == nullptr);
  CHECK(std::string(el_last_error()) == "rank 2 is not among the ranks of this adapter: 1, 3");
  CHECK(el_adapter_at_rank(whole, 1, nullptr) == EL_INVALID_ARGUMENT);
  CHECK(el_adapter_at_rank(whole, 1, &view) == EL_OK);
  el_adapter_close(whole);
  CHECK(el_adapter_low_rank_shape(view, "w", &rank, &in, &out) == EL_OK);
  CHECK(rank == 1 && in == 3 && out == 2);
  el_adapter_close(view);
  unlink(path.c_str());
}
