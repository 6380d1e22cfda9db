// What the programs that time kernels share.
#ifndef QSK_TESTS_TIMING_H_
#define QSK_TESTS_TIMING_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

[[noreturn]] inline void fail(const char* message) {
  fprintf(stderr, "%s\n", message);
  exit(2);
}

// In huge pages where the system has them, as weights are in a bundle.
class Bytes {
 public:
  explicit Bytes(int64_t bytes) {
    constexpr int64_t kHugePage = 2 << 20;
    const int64_t alignment = bytes < kHugePage ? 64 : kHugePage;
    const int64_t whole = (bytes + 64 + alignment - 1) / alignment * alignment;
    if (posix_memalign(&base_, alignment, whole) != 0) fail("out of memory");
#if defined(__linux__)
    if (alignment == kHugePage) madvise(base_, whole, MADV_HUGEPAGE);
#endif
    memset(base_, 0, bytes);
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { free(base_); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(base_);
  }

 private:
  void* base_ = nullptr;
};

#endif  // QSK_TESTS_TIMING_H_
