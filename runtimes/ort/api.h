// The few pieces of ONNX Runtime's C API that every custom op here uses: status, attributes, shapes, threads, scratch.
#ifndef QSPARSE_ORT_API_H_
#define QSPARSE_ORT_API_H_

#include <stdint.h>

#include <string>

#include "onnxruntime_c_api.h"
#include "qsk/parallel.h"

namespace qsparse_ort {

// The oldest API with all that is used here; its newest part is OrtCustomOp::GetStartVersion and GetMayInplace.
constexpr uint32_t kApiVersion = 18;

OrtStatus* error(const OrtApi& api, const std::string& message);
// A status for a code of the kernel library; nullptr for QSK_OK.
OrtStatus* kernel_error(const OrtApi& api, const char* op, int status);

struct Shape {
  static constexpr size_t kMostDims = 16;
  int64_t dims[kMostDims];
  size_t rank;
  int64_t elements;
};

OrtStatus* shape_of(const OrtApi& api, const OrtValue* value, Shape* shape);
// "[2, 3, 4]"
std::string to_string(const Shape& shape);

OrtStatus* read_int(const OrtApi& api, const OrtKernelInfo* info, const char* op, const char* name, int64_t* value);
OrtStatus* read_float(const OrtApi& api, const OrtKernelInfo* info, const char* op, const char* name, float* value);
// At most `capacity` values; an error when there are more.
OrtStatus* read_ints(const OrtApi& api, const OrtKernelInfo* info, const char* op, const char* name, int64_t* values,
                     size_t capacity, size_t* count);
OrtStatus* read_string(const OrtApi& api, const OrtKernelInfo* info, const char* op, const char* name,
                       std::string* value);

// ORT's own intra-op threads as the kernel library's callback. Its size is not in the API, so that one task per
// processor is offered; the kernels let the threads that there are take all the work.
class Pool {
 public:
  Pool(const OrtApi& api, const OrtKernelContext* context);
  const qsk_parallel* parallel() const { return &parallel_; }
  OrtStatus* take_status();  // of the runs so far

 private:
  static void run(void* self, void (*task)(void*, int64_t), void* argument, int64_t count);
  const OrtApi& api_;
  const OrtKernelContext* context_;
  OrtStatus* status_ = nullptr;
  qsk_parallel parallel_;
};

// Memory of the calling thread, grown and kept (KernelContext_GetScratchBuffer leaks on CPU as of ORT 1.32), aligned to
// 64 bytes. nullptr when there is none left.
void* thread_scratch(int64_t bytes);

}  // namespace qsparse_ort

#define QSPARSE_RETURN_IF_ERROR(expression)                         \
  do {                                                              \
    if (OrtStatus* status_ = (expression); status_) return status_; \
  } while (false)

#endif  // QSPARSE_ORT_API_H_
