#include "huge_pages.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace qsparse_ort {
namespace {

std::atomic<int64_t> held_bytes{0};

}  // namespace

#ifdef __linux__
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kChunkBytes = 64 << 20;  // many small weights share pages
constexpr size_t kSliceBytes = 8 << 20;   // that are there twice

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Address space in huge pages, of which parts are handed out; memory is taken as they are written.
class Chunk {
 public:
  explicit Chunk(size_t bytes) : bytes_(round_up(bytes, kHugePage)) {
    void* const mapped =
        mmap(nullptr, bytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return;
    mapped_ = mapped;
    begin_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(mapped), kHugePage));
    madvise(begin_, bytes_, MADV_HUGEPAGE);
  }
  ~Chunk() {
    if (mapped_ != nullptr) munmap(mapped_, bytes_ + kHugePage);
  }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;

  // Null when it is full.
  void* take(size_t bytes) {
    if (begin_ == nullptr || bytes > bytes_ - used_) return nullptr;
    void* const taken = begin_ + used_;
    used_ += round_up(bytes, 64);
    if (used_ > bytes_) used_ = bytes_;
    return taken;
  }

 private:
  const size_t bytes_;
  void* mapped_ = nullptr;
  uint8_t* begin_ = nullptr;
  size_t used_ = 0;
};

bool has_huge_pages() {
  FILE* const file = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (file == nullptr) return false;
  char words[128] = {};
  const bool is_read = fgets(words, sizeof words, file) != nullptr;
  fclose(file);
  return is_read && strstr(words, "[never]") == nullptr;
}

bool is_wanted() {
  const char* const word = getenv("QSPARSE_HUGE_PAGES");
  return word == nullptr || strcmp(word, "0") != 0;
}

// Whether a quarter of the machine's memory stays available besides `bytes` more.
bool has_room(size_t bytes) {
  FILE* const file = fopen("/proc/meminfo", "r");
  if (file == nullptr) return false;
  char line[128];
  unsigned long long total_kib = 0, available_kib = 0;
  while (fgets(line, sizeof line, file) != nullptr) {
    sscanf(line, "MemTotal: %llu", &total_kib);
    sscanf(line, "MemAvailable: %llu", &available_kib);
  }
  fclose(file);
  return available_kib > total_kib / 4 + bytes / 1024;
}

// Whether all pages from `begin` to `end` are a file's, and none was written to: then nothing is lost when their memory
// is given back.
bool are_of_file(uintptr_t begin, uintptr_t end, size_t page_bytes) {
  constexpr uint64_t kPresent = 1ull << 63, kOfFile = 1ull << 61;
  for (uintptr_t page = begin; page < end; page += page_bytes) {
    *reinterpret_cast<const volatile uint8_t*>(page);  // so that it is present
  }
  const int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  std::vector<uint64_t> entries((end - begin) / page_bytes);
  const size_t wanted = entries.size() * sizeof(uint64_t);
  const ssize_t got = pread(file, entries.data(), wanted, static_cast<off_t>(begin / page_bytes * sizeof(uint64_t)));
  close(file);
  if (got < 0 || static_cast<size_t>(got) != wanted) return false;
  for (uint64_t entry : entries) {
    if ((entry & kPresent) == 0 || (entry & kOfFile) == 0) return false;
  }
  return true;
}

// Copies, and gives the memory of the original's pages back; false for what is no file's.
bool move_from_file(void* copy, const void* data, size_t bytes) {
  const size_t page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first_page = round_up(begin, page_bytes), last_page = (begin + bytes) / page_bytes * page_bytes;
  if (first_page >= last_page) return false;
  auto* const to = static_cast<uint8_t*>(copy);
  memcpy(to, data, first_page - begin);
  for (uintptr_t from = first_page; from < last_page; from += kSliceBytes) {
    const uintptr_t end = last_page - from < kSliceBytes ? last_page : from + kSliceBytes;
    if (!are_of_file(from, end, page_bytes)) return false;
    memcpy(to + (from - begin), reinterpret_cast<const void*>(from), end - from);
    madvise(reinterpret_cast<void*>(from), end - from, MADV_DONTNEED);
  }
  memcpy(to + (last_page - begin), reinterpret_cast<const void*>(last_page), begin + bytes - last_page);
  return true;
}

}  // namespace

std::shared_ptr<const void> in_huge_pages(const void* data, size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Chunk> latest;
  if (bytes == 0 || !is_wanted() || !has_huge_pages()) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!has_room(bytes)) return nullptr;
  std::shared_ptr<Chunk> chunk = latest.lock();
  void* copy = chunk == nullptr ? nullptr : chunk->take(bytes);
  if (copy == nullptr) {
    chunk = std::make_shared<Chunk>(bytes > kChunkBytes ? bytes : kChunkBytes);
    copy = chunk->take(bytes);
    if (copy == nullptr) return nullptr;
    latest = chunk;
  }
  if (!move_from_file(copy, data, bytes)) return nullptr;
  held_bytes += static_cast<int64_t>(bytes);
  return std::shared_ptr<const void>(copy, [chunk, bytes](const void*) { held_bytes -= static_cast<int64_t>(bytes); });
}
#else
std::shared_ptr<const void> in_huge_pages(const void*, size_t) { return nullptr; }
#endif

}  // namespace qsparse_ort

int64_t qsparse_ort_huge_page_bytes() { return qsparse_ort::held_bytes.load(); }
