#include "packed_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "status.h"

namespace edge_lora {
namespace {

// The index of ExecuTorch 1.5: per entry the length of its name (u32), the name, offset (u64),
// bytes (u64) and a number that names the kernel (u32); then the start of the index (u64), the
// number of entries (u32), a magic number (u32) and a version (u32). Little-endian, no padding.
constexpr uint32_t kMagic = 0x58505743;
constexpr uint32_t kVersion = 2;
constexpr uint64_t kFooterBytes = 20;
constexpr uint32_t kMaxName = 4096;

[[noreturn]] void Refuse(const std::string& reason) {
  throw Error(Code::kUnsupported, "packed weights of ExecuTorch: " + reason);
}

struct stat StatOf(int descriptor) {
  struct stat status = {};
  if (fstat(descriptor, &status) != 0) {
    throw Error(Code::kInvalidArgument,
                "packed_fd " + std::to_string(descriptor) + ": " + std::strerror(errno));
  }
  return status;
}

class Cursor {
 public:
  Cursor(const uint8_t* from, const uint8_t* end) : at_(from), end_(end) {}

  template <typename T>
  T Get() {
    T value;
    std::memcpy(&value, Step(sizeof value), sizeof value);
    return value;
  }
  std::string Text(uint32_t bytes) { return {reinterpret_cast<const char*>(Step(bytes)), bytes}; }
  bool is_at_end() const { return at_ == end_; }

 private:
  const uint8_t* Step(uint64_t bytes) {
    if (std::cmp_greater(bytes, end_ - at_)) Refuse("the index is cut short");
    return std::exchange(at_, at_ + bytes);
  }

  const uint8_t* at_;
  const uint8_t* end_;
};

}  // namespace

Mapping::Mapping(int descriptor, uint64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) {
    throw Error(Code::kOutOfMemory, "cannot map " + std::to_string(bytes) +
                                        " bytes of packed weights: " + std::strerror(errno));
  }
  data_ = static_cast<uint8_t*>(memory);
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

std::shared_ptr<const PackedFile> PackedFile::At(int descriptor) {
  static std::mutex mutex;
  static std::map<std::pair<dev_t, ino_t>, std::weak_ptr<const PackedFile>> files;

  const struct stat status = StatOf(descriptor);
  const int access = fcntl(descriptor, F_GETFL) & O_ACCMODE;
  if (!S_ISREG(status.st_mode) || access != O_RDWR) {
    throw Error(Code::kInvalidArgument, "packed_fd " + std::to_string(descriptor) +
                                            " must be a plain file, open to read and write: make "
                                            "one with os.memfd_create");
  }
  const std::scoped_lock lock(mutex);
  std::erase_if(files, [](const auto& file) { return file.second.expired(); });
  std::weak_ptr<const PackedFile>& known = files[{status.st_dev, status.st_ino}];
  if (std::shared_ptr<const PackedFile> file = known.lock()) return file;
  const int own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (own < 0) {
    throw Error(Code::kInputOutput, std::string("cannot keep packed_fd: ") + std::strerror(errno));
  }
  auto file = std::make_shared<const PackedFile>(own);
  known = file;
  return file;
}

PackedFile::~PackedFile() { close(descriptor_); }

std::string PackedFile::path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

uint64_t PackedFile::bytes() const { return static_cast<uint64_t>(StatOf(descriptor_).st_size); }

std::shared_ptr<const Mapping> PackedFile::Map() const {
  return std::make_shared<const Mapping>(descriptor_, bytes());
}

PackedIndex ReadPackedIndex(const uint8_t* file, uint64_t bytes) {
  PackedIndex index;
  if (bytes == 0) return index;
  if (bytes < kFooterBytes) Refuse("the file has no index");
  Cursor footer(file + bytes - kFooterBytes, file + bytes);
  const auto start = footer.Get<uint64_t>();
  const auto count = footer.Get<uint32_t>();
  const auto magic = footer.Get<uint32_t>();
  const auto version = footer.Get<uint32_t>();
  if (magic != kMagic) Refuse("the file has no index");
  if (version != kVersion) {
    Refuse("the index has version " + std::to_string(version) + ", this reader knows " +
           std::to_string(kVersion) + ": install executorch==1.5.1");
  }
  if (start > bytes - kFooterBytes) Refuse("the index starts beyond the end of the file");
  Cursor cursor(file + start, file + bytes - kFooterBytes);
  for (uint32_t i = 0; i < count; ++i) {
    const auto length = cursor.Get<uint32_t>();
    if (length == 0 || length > kMaxName) Refuse("an entry has no sound name");
    const std::string name = cursor.Text(length);
    const auto offset = cursor.Get<uint64_t>();
    const PackedEntry entry{offset, cursor.Get<uint64_t>()};
    cursor.Get<uint32_t>();
    if (entry.offset > start || entry.bytes > start - entry.offset) {
      Refuse("entry '" + name + "' lies outside of the file");
    }
    if (!index.emplace(name, entry).second) Refuse("entry '" + name + "' is there twice");
  }
  if (!cursor.is_at_end()) Refuse("the index has more than its entries");
  return index;
}

}  // namespace edge_lora
