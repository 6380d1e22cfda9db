// What a caller must know of the device.
#include "device.h"

int64_t qsk_cuda_multiprocessors(void) { return qsk_cuda::count_multiprocessors(); }
