#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace edge_lora {

File::File(const std::string& path, Code code)
    // O_NONBLOCK: opening a pipe that nobody writes to must not hang.
    : path_(path), code_(code), descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (descriptor_ < 0) throw Error(code, ErrnoMessage("open", path));
  struct stat info = {};
  if (fstat(descriptor_, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(descriptor_);
    throw Error(code, "'" + path + "' is not a plain file");
  }
}

File::~File() { close(descriptor_); }

uint64_t File::size() const {
  struct stat info = {};
  if (fstat(descriptor_, &info) != 0) throw Error(code_, ErrnoMessage("read", path_));
  return static_cast<uint64_t>(info.st_size);
}

void File::Read(void* out, size_t bytes, uint64_t offset) const {
  auto* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = pread(descriptor_, to, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw Error(code_, ErrnoMessage("read", path_));
    if (got == 0) {
      throw Error(code_, "'" + path_ + "' ends at byte " + std::to_string(offset) + ", " +
                             std::to_string(bytes) + " more were expected: it was cut");
    }
    to += got;
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<size_t>(got);
  }
}

void WriteAtomically(const std::string& path, const void* data, size_t bytes) {
  const std::string part = path + "." + std::to_string(getpid()) + ".part";
  const int descriptor = open(part.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor < 0) throw Error(Code::kInputOutput, ErrnoMessage("write", part));
  const auto* from = static_cast<const char*>(data);
  bool good = true;
  while (good && bytes > 0) {
    const ssize_t put = write(descriptor, from, bytes);
    if (put < 0 && errno == EINTR) continue;
    good = put > 0;
    if (good) {
      from += put;
      bytes -= static_cast<size_t>(put);
    }
  }
  good = good && fsync(descriptor) == 0;
  good = close(descriptor) == 0 && good;
  good = good && std::rename(part.c_str(), path.c_str()) == 0;
  if (good) return;
  const std::string message = ErrnoMessage("write", path);
  unlink(part.c_str());
  throw Error(Code::kInputOutput, message);
}

}  // namespace edge_lora
