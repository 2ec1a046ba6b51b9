// A swap that runs out of memory, at every allocation it makes: the image is as it was, or it says
// that it is damaged. Nothing in between.
#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>

#include "adapter_writer.h"
#include "check.h"
#include "image.h"
#include "layouts.h"

using namespace edge_lora;

namespace {

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

std::atomic<int64_t> allocations_left{kAll};
std::atomic<int64_t> failures_left{0};

void* Allocate(size_t bytes) {
  if (allocations_left.fetch_sub(1) <= 0 && failures_left.fetch_sub(1) > 0) throw std::bad_alloc();
  void* memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

// NOLINTBEGIN(cppcoreguidelines-owning-memory)
void* operator new(size_t bytes) { return Allocate(bytes); }
void* operator new[](size_t bytes) { return Allocate(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
// NOLINTEND(cppcoreguidelines-owning-memory)

namespace {

constexpr Shape kShape{48, 300};

std::shared_ptr<const AdapterFile> Open(const AdapterWriter& writer, const std::string& form) {
  const std::string path =
      WriteTo(TestPath("a"),
              writer.Finish(R"({"w":{"shape":[48,300],"dtype":"F32","forms":[)" + form + "]}}"));
  auto adapter = AdapterFile::Open(path);
  unlink(path.c_str());
  return adapter;
}

std::shared_ptr<const AdapterFile> LowRankAdapter() {
  AdapterWriter writer;
  writer.Add("w/0/A", "F32", "1,300", BytesOf(std::vector<float>(300, 0.5F)));
  writer.Add("w/0/Bt", "F32", "1,48", BytesOf(std::vector<float>(48, 2.0F)));
  return Open(writer, R"({"form":"low_rank","scale":1.0})");
}

std::shared_ptr<const AdapterFile> RowAdapter() {
  AdapterWriter writer;
  writer.Add("w/0/idx", "U32", "1", BytesOf(std::vector<uint32_t>{0}));
  writer.Add("w/0/val", "F32", "1,300", BytesOf(std::vector<float>(300, 4.0F)));
  return Open(writer, R"({"form":"block","axis":"row","scale":1.0,"mode":"add"})");
}

struct Outcome {
  bool is_done = false;
  bool is_damaged = false;
};

enum class Kind : uint8_t { kLowRank, kRows };

/// Swaps from one patch to another while `failures` allocations fail after `allowed` ones.
Outcome Attempt(const std::string& path, Kind from_kind, Kind to_kind, int64_t allowed,
                int64_t failures) {
  Image image(2);
  image.AddSlot("w", kShape, path, 0, Stored::kOutIn);
  const auto layout = PanelLayout(kShape);
  std::vector<float> block(layout->elements());
  for (uint64_t n = 0; n < kShape.out; ++n) {
    for (uint64_t k = 0; k < kShape.in; ++k) block[layout->Offset(k, n)] = 1.0F;
  }
  const auto base = block;
  CHECK(image.AddPlace("w", layout, block.data(), block.size() * sizeof(float)));
  const auto compile = [&](Kind kind, double weight) {
    return image.Compile({{kind == Kind::kRows ? RowAdapter() : LowRankAdapter(), weight}});
  };
  const auto from = compile(from_kind, 1.0);
  const auto to = compile(to_kind, 2.0);
  image.Swap(to);
  const auto wanted = block;
  image.Swap(from);
  const auto before = block;

  bool is_done = true;
  failures_left = failures;
  allocations_left = allowed;
  try {
    image.Swap(to);
  } catch (const std::bad_alloc&) {
    is_done = false;
  }
  allocations_left = kAll;
  failures_left = 0;

  if (is_done) {
    CHECK(block == wanted && image.active() == to && !image.is_damaged());
  } else if (image.is_damaged()) {
    for (const std::string& message :
         {MessageOf([&] { image.Swap(nullptr); }), MessageOf([&] { image.Sha256(); }),
          MessageOf([&] { image.Compile({}); }), MessageOf([&] { image.DifferingSlots(); }),
          MessageOf([&] { image.Poke("w", 0, 1.0F); }), MessageOf([&] { image.ShapeOf("w"); })}) {
      CHECK(Has(message, "failed half way"));
    }
  } else {
    CHECK(block == before && image.active() == from);
    image.Swap(to);
    CHECK(block == wanted);
    image.Swap(nullptr);
    CHECK(block == base);
  }
  return {is_done, image.is_damaged()};
}

}  // namespace

int main() {
  const std::string path = TestPath("weights");
  WriteTo(path, BytesOf(std::vector<float>(kShape.size(), 1.0F)));
  bool was_damaged = false;
  for (const auto& [from, to] :
       {std::pair(Kind::kLowRank, Kind::kRows), std::pair(Kind::kRows, Kind::kLowRank),
        std::pair(Kind::kLowRank, Kind::kLowRank)}) {
    for (const int64_t failures : {int64_t{1}, kAll}) {
      int64_t refused = 0;
      for (int64_t allowed = 0; allowed < 100; ++allowed) {
        const Outcome outcome = Attempt(path, from, to, allowed, failures);
        CHECK(!outcome.is_damaged || failures == kAll);  // one failure alone is always undone
        was_damaged = was_damaged || outcome.is_damaged;
        refused += outcome.is_done ? 0 : 1;
      }
      CHECK(refused > 0 && refused < 100);
    }
  }
  CHECK(was_damaged);
  unlink(path.c_str());
}
