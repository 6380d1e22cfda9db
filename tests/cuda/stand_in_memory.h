// Device memory that is the host's: each allocation ends at pages that cannot be touched, begins behind such pages, and
// is never given out again while it can still be confused with another one.
#ifndef QSK_TESTS_CUDA_STAND_IN_MEMORY_H_
#define QSK_TESTS_CUDA_STAND_IN_MEMORY_H_

#include <stddef.h>

#include <string>

namespace stand_in {

// Every byte is `garbage`. NULL for 0 bytes, and where there is no memory.
void* allocate(size_t bytes, int garbage);

// The functions below give what is wrong, "" for nothing.
std::string release(void* memory);
// With the bytes from `begin` on, as an argument of a copy or a kernel.
std::string check(const void* begin, size_t bytes);
// With the bytes beside the allocation in which `inside` lies.
std::string check_surroundings(const void* inside);

// Where an address lies.
std::string describe(const void* address);

size_t allocated_bytes();

}  // namespace stand_in

#endif  // QSK_TESTS_CUDA_STAND_IN_MEMORY_H_
