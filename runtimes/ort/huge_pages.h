// Weights in pages of 2 MB. A product that skips channels reads rows all over a matrix, and a mapped file comes in
// pages of 4 KB: more of them than the processor keeps addresses for. Linux has huge pages for a program's own memory.
#ifndef QSPARSE_ORT_HUGE_PAGES_H_
#define QSPARSE_ORT_HUGE_PAGES_H_

#include <stddef.h>
#include <stdint.h>

#include <memory>

#include "qsk/variant.h"

namespace qsparse_ort {

// A copy in huge pages, aligned to 64 bytes, of `bytes` at `data`, a mapped file, whose own memory is given back: it
// can be read as before. Null where it is no mapped file (there would be two of it), where the system has no huge
// pages, where less than a quarter of the machine's memory would be left, or where QSPARSE_HUGE_PAGES is 0.
std::shared_ptr<const void> in_huge_pages(const void* data, size_t bytes);

}  // namespace qsparse_ort

// The bytes of weights that in_huge_pages holds for all sessions of this process.
extern "C" QSK_API int64_t qsparse_ort_huge_page_bytes(void);

#endif  // QSPARSE_ORT_HUGE_PAGES_H_
