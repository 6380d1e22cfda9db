#include "stand_in_memory.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <deque>
#include <map>

namespace stand_in {
namespace {

constexpr size_t kAlignment = 64;  // a GPU's is 256: the larger it is, the later an overrun shows
constexpr size_t kPage = 4096;
constexpr size_t kGuard = 64 << 10;
constexpr size_t kFreedToRemember = 4096;
constexpr unsigned char kSurroundings = 0xC3;

struct Allocation {
  char* mapping;
  size_t mapping_bytes;
  char* begin;
  size_t bytes;
  bool is_freed;

  char* pages() const { return mapping + kGuard; }
  char* pages_end() const { return mapping + mapping_bytes - kGuard; }
};

std::map<const char*, Allocation> allocations;  // by the begin of the mapping
std::deque<const char*> freed;
size_t total_bytes = 0;

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

// NULL outside of all mappings.
Allocation* find(const void* address) {
  const char* wanted = static_cast<const char*>(address);
  auto next = allocations.upper_bound(wanted);
  if (next == allocations.begin()) return nullptr;
  Allocation& candidate = (--next)->second;
  return wanted < candidate.mapping + candidate.mapping_bytes ? &candidate : nullptr;
}

std::string name(const Allocation& allocation) {
  return std::string(allocation.is_freed ? "a freed allocation" : "an allocation") + " of " +
         std::to_string(allocation.bytes) + " bytes";
}

bool is_untouched(const char* begin, const char* end) {
  for (; begin < end; ++begin) {
    if (static_cast<unsigned char>(*begin) != kSurroundings) return false;
  }
  return true;
}

std::string surroundings_problem(const Allocation& allocation) {
  if (!is_untouched(allocation.pages(), allocation.begin)) return "bytes in front of " + name(allocation) + " changed";
  if (!is_untouched(allocation.begin + allocation.bytes, allocation.pages_end())) {
    return "bytes behind " + name(allocation) + " changed";
  }
  return "";
}

}  // namespace

void* allocate(size_t bytes, int garbage) {
  if (bytes == 0) return nullptr;
  const size_t used = round_up(bytes, kAlignment), pages = round_up(used, kPage);
  Allocation made = {};
  made.mapping_bytes = pages + 2 * kGuard;
  void* mapping = mmap(nullptr, made.mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  made.mapping = static_cast<char*>(mapping);
  if (mprotect(made.pages(), pages, PROT_READ | PROT_WRITE) != 0) {
    munmap(mapping, made.mapping_bytes);
    return nullptr;
  }
  made.begin = made.pages_end() - used;
  made.bytes = bytes;
  memset(made.pages(), kSurroundings, pages);
  memset(made.begin, garbage, bytes);
  total_bytes += bytes;
  allocations[made.mapping] = made;
  return made.begin;
}

std::string release(void* memory) {
  if (memory == nullptr) return "";
  Allocation* allocation = find(memory);
  if (allocation == nullptr || allocation->is_freed || allocation->begin != memory) {
    return "what is freed is " + describe(memory);
  }
  const std::string problem = surroundings_problem(*allocation);
  total_bytes -= allocation->bytes;
  allocation->is_freed = true;
  // Gives the memory back and keeps the addresses.
  mmap(allocation->mapping, allocation->mapping_bytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  freed.push_back(allocation->mapping);
  if (freed.size() > kFreedToRemember) {
    const auto oldest = allocations.find(freed.front());
    munmap(oldest->second.mapping, oldest->second.mapping_bytes);
    allocations.erase(oldest);
    freed.pop_front();
  }
  return problem;
}

std::string check(const void* begin, size_t bytes) {
  const Allocation* allocation = find(begin);
  const char* first = static_cast<const char*>(begin);
  if (allocation == nullptr || allocation->is_freed || first < allocation->begin ||
      first >= allocation->begin + allocation->bytes) {
    return describe(begin);
  }
  const size_t left = allocation->begin + allocation->bytes - first;
  if (bytes > left)
    return std::to_string(bytes) + " bytes of which " + name(*allocation) + " has " + std::to_string(left);
  return "";
}

std::string check_surroundings(const void* inside) {
  const Allocation* allocation = find(inside);
  return allocation == nullptr || allocation->is_freed ? "" : surroundings_problem(*allocation);
}

std::string describe(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) < kPage) return "a null pointer";
  const Allocation* allocation = find(address);
  if (allocation == nullptr) return "no device memory";
  const ptrdiff_t at = static_cast<const char*>(address) - allocation->begin;
  const ptrdiff_t behind = at - static_cast<ptrdiff_t>(allocation->bytes);
  if (at < 0) return std::to_string(-at) + " bytes in front of " + name(*allocation);
  if (behind >= 0) return std::to_string(behind) + " bytes behind the end of " + name(*allocation);
  return "byte " + std::to_string(at) + " of " + name(*allocation);
}

size_t allocated_bytes() { return total_bytes; }

}  // namespace stand_in
