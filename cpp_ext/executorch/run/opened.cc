#include "opened.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <set>

#include "file.h"
#include "probe.h"
#include "sha256.h"
#include "status.h"

namespace edge_lora {
namespace {

void RequireWhole(const Bundle& bundle, std::span<const uint8_t> pte) {
  // XNNPACK trusts its part of a program, so a damaged one must not get there.
  if (Sha256Hex(pte.data(), pte.size()) != bundle.sha256) {
    throw Error(Code::kBundle, "'" + bundle.program +
                                   "' is damaged: its sha256 is not the manifest's. Copy or export "
                                   "the bundle again");
  }
  std::vector<std::string> problems;
  for (const BundleSlot& slot : bundle.slots) {
    if (!slot.is_fp32) continue;
    for (const uint64_t offset : std::set{slot.offset, slot.packed_offset}) {
      if (Sha256Hex(pte.data() + offset, slot.shape().size() * sizeof(float)) == slot.sha256) {
        continue;
      }
      problems.push_back(slot.name + ": the bytes at " + std::to_string(offset) +
                         " have another sha256 than the slot table's");
    }
  }
  if (problems.empty()) return;
  throw Error(Code::kBundle,
              ListAll("'" + bundle.program + "' does not hold the weights of its base", problems));
}

std::shared_ptr<const PackedFile> MakePackedFile() {
  const int descriptor = memfd_create("edge-lora-packed", MFD_CLOEXEC);
  if (descriptor < 0) throw Error(Code::kInputOutput, ErrnoMessage("make a memory file", "memfd"));
  return std::make_shared<const PackedFile>(descriptor);
}

}  // namespace

double Timed(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

PrivateMapping::PrivateMapping(const std::string& path, uint64_t bytes) : bytes_(bytes) {
  const uint64_t found = File(path, Code::kBundle).size();
  if (found != bytes || bytes == 0) {
    throw Error(Code::kBundle, "'" + path + "' has " + std::to_string(found) +
                                   " bytes, the manifest says " + std::to_string(bytes));
  }
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw Error(Code::kBundle, ErrnoMessage("open", path));
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  if (memory == MAP_FAILED) throw Error(Code::kOutOfMemory, ErrnoMessage("map", path));
  data_ = static_cast<uint8_t*>(memory);
}

PrivateMapping::~PrivateMapping() { munmap(data_, bytes_); }

OpenedBundle::OpenedBundle(const Bundle& bundle, int threads)
    : pte_(bundle.program, bundle.size), image_(threads) {
  check_ms_ = Timed([&] { RequireWhole(bundle, pte_.bytes()); });
  load_ms_ = Timed([&] { Load(bundle, threads); });
  bind_ms_ = Timed([&] { Bind(bundle); });
}

void OpenedBundle::Load(const Bundle& bundle, int threads) {
  std::vector<ProbeSlot> wanted;
  for (const BundleSlot& slot : bundle.slots) {
    const Shape shape = slot.shape();
    const auto is_known = [&](const ProbeSlot& known) { return known.shape == shape; };
    if (!slot.is_fp32 || slot.key.empty() || std::ranges::any_of(wanted, is_known)) continue;
    wanted.push_back({slot.key, slot.packed_offset, shape});
  }
  ProbedProgram probed = OpenProbed(pte_.bytes(), MakePackedFile(), threads, wanted);
  program_ = std::move(probed.program);
  for (size_t i = 0; i < wanted.size(); ++i) {
    layouts_.emplace_back(wanted[i].shape, probed.layouts[i]);
  }
  packed_ = program_->packed()->Map();
}

void OpenedBundle::Bind(const Bundle& bundle) {
  const PackedIndex index = ReadPackedIndex(packed_->data(), packed_->bytes());
  std::vector<std::string> problems;
  for (const BundleSlot& slot : bundle.slots) {
    if (!slot.is_fp32) continue;
    const Shape shape = slot.shape();
    image_.AddSlot(slot.name, shape, bundle.program, slot.offset, Stored::kOutIn);
    for (const std::string& alias : slot.aliases) image_.AddAlias(slot.name, alias);
    bool is_bound = slot.is_read_in_place || !slot.key.empty();
    const auto bind = [&](const std::shared_ptr<const Layout>& layout, uint8_t* block,
                          uint64_t bytes) {
      is_bound &= image_.AddPlace(slot.name, layout, reinterpret_cast<float*>(block), bytes);
    };
    if (slot.is_read_in_place) {
      bind(Layout::Plain(shape, Stored::kOutIn), pte_.bytes().data() + slot.offset,
           shape.size() * sizeof(float));
    }
    if (!slot.key.empty()) {
      const auto entry = index.find(slot.key);
      const auto layout =
          std::ranges::find_if(layouts_, [&](const auto& known) { return known.first == shape; });
      if (entry == index.end() || layout == layouts_.end()) {
        is_bound = false;
      } else {
        bind(layout->second, packed_->data() + entry->second.offset, entry->second.bytes);
      }
    }
    if (!is_bound) problems.push_back(slot.name + ": the program does not hold its weight");
  }
  if (!problems.empty()) {
    throw Error(Code::kUnsupported,
                ListAll("'" + bundle.program + "' cannot be patched in place", problems));
  }
}

}  // namespace edge_lora
