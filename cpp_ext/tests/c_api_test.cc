#include <cstring>

#include "adapter_writer.h"
#include "check.h"
#include "edge_lora/edge_lora.h"

int main() {
  CHECK(el_abi_version() == EL_ABI_VERSION);
  CHECK(std::strcmp(el_allocator_status(), "not registered") == 0);
  CHECK(el_live_blocks(nullptr, 0) == 0);

  el_adapter* adapter = nullptr;
  CHECK(el_adapter_open("/nowhere", &adapter) == EL_ADAPTER_FILE && adapter == nullptr);
  CHECK(Has(el_last_error(), "/nowhere"));
  CHECK(el_adapter_open(nullptr, &adapter) == EL_INVALID_ARGUMENT);

  AdapterWriter writer;
  writer.Add("w/0/A", "F32", "1,2", BytesOf(std::vector<float>{1, 2}));
  writer.Add("w/0/Bt", "F32", "1,3", BytesOf(std::vector<float>{1, 10, 100}));
  const std::string path = TestPath("c_api");
  WriteTo(
      path,
      writer.Finish(
          R"({"w":{"shape":[3,2],"dtype":"F32","forms":[{"form":"low_rank","scale":2}]}})", 0.5));
  CHECK(el_adapter_open(path.c_str(), &adapter) == EL_OK);
  CHECK(el_adapter_slot_count(adapter) == 1 && el_adapter_slot_name(adapter, 1) == nullptr);
  uint32_t rank = 0;
  uint64_t in = 0;
  uint64_t out = 0;
  CHECK(el_adapter_low_rank_shape(adapter, "w", &rank, &in, &out) == EL_OK);
  CHECK(rank == 1 && in == 2 && out == 3);
  CHECK(el_adapter_low_rank_shape(adapter, "v", &rank, &in, &out) == EL_ADAPTER_MISMATCH);
  float a[2];
  float b[3];
  CHECK(el_adapter_low_rank(adapter, "w", a, b) == EL_OK && a[1] == 2 && b[2] == 100);

  const std::vector<float> base = {1, 2, 3, 4, 5, 6};
  std::vector<float> block = base;
  std::vector<float> other = {1, 2, 3, 4, 5, 7};
  WriteTo(path, BytesOf(base));
  el_image* image = nullptr;
  el_layout* layout = nullptr;
  el_patch* patch = nullptr;
  int32_t bound = -1;
  CHECK(el_image_open(0, &image) == EL_INVALID_ARGUMENT);
  CHECK(el_image_open(1, &image) == EL_OK);
  CHECK(el_image_add_slot(image, "w", 2, 3, path.c_str(), 4, EL_STORED_OI) == EL_BUNDLE);
  CHECK(el_image_add_slot(image, "w", 2, 3, path.c_str(), 0, EL_STORED_OI) == EL_OK);
  CHECK(el_layout_plain(2, 3, EL_STORED_OI, &layout) == EL_OK);
  CHECK(el_image_add_place(image, "w", layout, other.data(), 24, &bound) == EL_OK && bound == 0);
  CHECK(el_image_add_place(image, "w", layout, block.data(), 24, &bound) == EL_OK && bound == 1);
  el_layout_free(layout);
  const double weight = 1.0;
  CHECK(el_image_compile(image, &adapter, &weight, 1, &patch) == EL_OK);
  el_adapter_close(adapter);
  CHECK(el_patch_changed(patch) == 6 && std::strcmp(el_patch_slot_name(patch, 0), "w") == 0);
  el_swap_stats stats;
  CHECK(el_image_swap(image, patch, &stats) == EL_OK && stats.bytes == 24);
  CHECK((block == std::vector<float>{2, 4, 13, 24, 105, 206}));
  el_patch_free(patch);  // the image keeps it
  char hex[65];
  size_t differing = 0;
  CHECK(el_image_differing_slots(image, &differing) == EL_OK && differing == 1);
  CHECK(el_image_swap(image, nullptr, nullptr) == EL_OK && block == base);
  CHECK(el_image_sha256(image, hex) == EL_OK && hex[64] == 0);
  CHECK(edge_lora::Sha256Hex(base.data(), 24) == hex);
  int32_t damaged = -1;
  CHECK(el_image_damaged(image, &damaged) == EL_OK && damaged == 0);
  CHECK(el_image_damaged(nullptr, &damaged) == EL_INVALID_ARGUMENT);
  el_image_close(image);
  unlink(path.c_str());
}
