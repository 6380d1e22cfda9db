// Between the two halves of the stand-in, the CUDA runtime and the driver: work in the order of its stream, or recorded
// by a capture; what went wrong; and what is counted.
#ifndef QSK_TESTS_CUDA_STAND_IN_WORK_H_
#define QSK_TESTS_CUDA_STAND_IN_WORK_H_

#include <cuda_runtime_api.h>

#include <functional>
#include <string>

namespace stand_in {

using Work = std::function<cudaError_t()>;

// Does it at once, or records it where the stream captures.
cudaError_t perform(cudaStream_t stream, Work work);
// The same of a kernel, with which the device can go away.
cudaError_t launch(cudaStream_t stream, Work kernel);

// Remembers what is wrong, for cudaGetErrorString and for take_problem, and gives `status` back.
cudaError_t fail(cudaError_t status, const std::string& problem);
const char* last_problem();

void count(const std::string& what);

}  // namespace stand_in

#endif  // QSK_TESTS_CUDA_STAND_IN_WORK_H_
