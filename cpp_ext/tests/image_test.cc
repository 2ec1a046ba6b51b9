#include "image.h"

#include <cmath>
#include <random>

#include "adapter_writer.h"
#include "check.h"
#include "layouts.h"

using namespace edge_lora;

namespace {

/// A slot stored one way, in two places packed in two ways, and a low-rank and a sparse adapter.
class Fixture {
 public:
  Fixture(Shape shape, Stored stored) : shape_(shape), image(2) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    weight_.resize(shape.size());
    for (float& value : weight_) value = normal(random);
    std::string bytes = "12345678";
    for (uint64_t i = 0; i < shape.size(); ++i) {
      const uint64_t flat = stored == Stored::kOutIn ? i : i % shape.out * shape.in + i / shape.out;
      bytes.append(reinterpret_cast<const char*>(&weight_[flat]), sizeof(float));
    }
    path_ = WriteTo(TestPath("weights"), bytes);
    image.AddSlot("w", shape, path_, 8, stored);
    Pack(PanelLayout(shape), panels);
    Pack(Layout::Plain(shape, Stored::kOutIn), plain);
  }
  ~Fixture() { unlink(path_.c_str()); }

  std::shared_ptr<const AdapterFile> LowRankAdapter(float a, float b) const {
    AdapterWriter writer;
    writer.Add("w/0/A", "F32", "1," + std::to_string(shape_.in),
               BytesOf(std::vector<float>(shape_.in, a)));
    writer.Add("w/0/Bt", "F32", "1," + std::to_string(shape_.out),
               BytesOf(std::vector<float>(shape_.out, b)));
    return Open(writer, R"({"form":"low_rank","scale":1.0})");
  }

  std::shared_ptr<const AdapterFile> RowAdapter(float value, const char* mode) const {
    AdapterWriter writer;
    writer.Add("w/0/idx", "U32", "1", BytesOf(std::vector<uint32_t>{0}));
    writer.Add("w/0/val", "F32", "1," + std::to_string(shape_.in),
               BytesOf(std::vector<float>(shape_.in, value)));
    return Open(writer,
                std::string(R"({"form":"block","axis":"row","scale":1.0,"mode":")") + mode + "\"}");
  }

  /// Whether both places hold `wanted(base, n)` everywhere.
  template <typename Wanted>
  bool Holds(const Wanted& wanted) {
    std::vector<float> merged(shape_.size());
    image.Merged("w", merged.data());
    for (uint64_t i = 0; i < shape_.size(); ++i) {
      const float value = wanted(weight_[i], i / shape_.in);
      if (merged[i] != value || plain[i] != value) return false;
    }
    return true;
  }
  bool HoldsBase() {
    return image.DifferingSlots().empty() && Holds([](float base, uint64_t) { return base; });
  }

 private:
  void Pack(const std::shared_ptr<const Layout>& layout, std::vector<float>& block) {
    block.resize(layout->elements());
    for (uint64_t n = 0; n < shape_.out; ++n) {
      for (uint64_t k = 0; k < shape_.in; ++k) {
        block[layout->Offset(k, n)] = weight_[n * shape_.in + k];
      }
    }
    CHECK(image.AddPlace("w", layout, block.data(), block.size() * 4));
  }

  std::shared_ptr<const AdapterFile> Open(const AdapterWriter& writer,
                                          const std::string& form) const {
    const std::string slots = R"({"w":{"shape":[)" + std::to_string(shape_.out) + "," +
                              std::to_string(shape_.in) + R"(],"dtype":"F32","forms":[)" + form +
                              "]}}";
    const std::string path = WriteTo(TestPath("a"), writer.Finish(slots));
    auto adapter = AdapterFile::Open(path);
    unlink(path.c_str());
    return adapter;
  }

  Shape shape_;
  std::vector<float> weight_;
  std::string path_;

 public:
  Image image;
  std::vector<float> panels;
  std::vector<float> plain;
};

void CheckLife(Shape shape, Stored stored) {
  Fixture f(shape, stored);
  CHECK(f.HoldsBase());
  const std::string sha = f.image.Sha256();
  const auto low = f.image.Compile({{f.LowRankAdapter(0.5F, 2.0F), 1.0}});
  const auto row = f.image.Compile({{f.RowAdapter(4.0F, "add"), 1.0}});
  const auto both =
      f.image.Compile({{f.LowRankAdapter(1.0F, 1.0F), 2.0}, {f.RowAdapter(4.0F, "add"), 1.0}});
  CHECK(f.HoldsBase());
  const auto is_low = [](float base, uint64_t) { return base + 1.0F; };
  const auto is_row = [](float base, uint64_t n) { return n == 0 ? base + 4.0F : base; };
  const auto is_both = [](float base, uint64_t n) { return base + (2.0F + (n == 0 ? 4.0F : 0)); };
  // Every way from one to another.
  for (int step = 0; step < 2; ++step) {
    f.image.Swap(low);
    CHECK(f.Holds(is_low));
    f.image.Swap(both);
    CHECK(f.Holds(is_both));
    f.image.Swap(row);
    CHECK(f.Holds(is_row));
    f.image.Swap(low);
    CHECK(f.Holds(is_low));
    f.image.Swap(row);
    f.image.Swap(nullptr);
    CHECK(f.HoldsBase());
  }
  f.image.Swap(both);
  f.image.Swap(nullptr);
  CHECK(f.image.Sha256() == sha);

  // Compiled while another is in, saved and read back.
  f.image.Swap(low);
  const auto again = f.image.Compile({{f.RowAdapter(4.0F, "add"), 1.0}});
  const std::string path = TestPath("patch");
  for (const auto& patch : {again, both}) {
    SavePatch(*patch, path);
    f.image.Swap(f.image.LoadPatch(path));
    CHECK(patch == again ? f.Holds(is_row) : f.Holds(is_both));
  }
  CHECK(!MessageOf([&] { SavePatch(*f.image.active(), path); }).empty());
  unlink(path.c_str());
  f.image.Swap(nullptr);
  CHECK(f.HoldsBase());

  // Refusals change nothing.
  CHECK(Has(MessageOf([&] { f.image.Compile({{f.RowAdapter(1, "set"), 0.5}}); }), "set"));
  CHECK(Has(MessageOf([&] {
              f.image.Compile({{f.RowAdapter(1, "set"), 1.0}, {f.LowRankAdapter(1, 1), 1.0}});
            }),
            "composed"));
  CHECK(Has(MessageOf([&] { f.image.Compile({{f.LowRankAdapter(3e38F, 3e38F), 1.0}}); }),
            "not finite"));
  CHECK(
      Has(MessageOf([&] { f.image.Compile({{f.RowAdapter(3e38F, "add"), 1e30}}); }), "not finite"));
  CHECK(f.HoldsBase());
  CHECK(f.image.Poke("w", 0, 42.0F) == f.plain[0] || f.plain[0] == 42.0F);
  CHECK(f.image.DifferingSlots().size() == 1);
}

/// The weight file was cut: nothing changes, and the message names it.
void CheckCutFile() {
  Fixture f({16, 64}, Stored::kInOut);
  const auto low = f.image.Compile({{f.LowRankAdapter(0.5F, 2.0F), 1.0}});
  f.image.Swap(low);
  const auto before = f.panels;
  CHECK(truncate(TestPath("weights").c_str(), 100) == 0);
  CHECK(Has(MessageOf([&] { f.image.Swap(nullptr); }), "changed after export"));
  CHECK(f.panels == before && f.image.active() == low);
}

void CheckForeign() {
  Fixture f({16, 8}, Stored::kOutIn);
  Image other(1);
  const auto patch = f.image.Compile({{f.RowAdapter(1.0F, "add"), 1.0}});
  CHECK(Has(MessageOf([&] { other.Swap(patch); }), "another image"));
  CHECK(Has(MessageOf([&] { other.Compile({{f.RowAdapter(1.0F, "add"), 1.0}}); }),
            "w: no such slot"));
  const auto layout = Layout::Plain({16, 8}, Stored::kOutIn);
  CHECK(Has(MessageOf([&] { f.image.AddPlace("w", layout, f.plain.data(), 512); }), "overlaps"));
  CHECK(Has(MessageOf([&] { f.image.AddPlace("w", layout, f.plain.data(), 511); }), "cannot hold"));
  std::vector<float> wrong(128);
  CHECK(!f.image.AddPlace("w", layout, wrong.data(), 512));
  f.image.AddAlias("w", "tied");
  CHECK(Has(MessageOf([&] { f.image.AddAlias("w", "tied"); }), "before"));
  f.image.Close();
  CHECK(Has(MessageOf([&] { f.image.Swap(nullptr); }), "closed"));
}

}  // namespace

int main() {
  for (const Stored stored : {Stored::kOutIn, Stored::kInOut}) {
    for (const Shape shape : {Shape{1, 1}, Shape{15, 3}, Shape{16, 64}, Shape{17, 65},
                              Shape{48, 300}, Shape{300, 17}, Shape{4100, 3}, Shape{3, 4100}}) {
      CheckLife(shape, stored);
    }
  }
  CheckCutFile();
  CheckForeign();
}
