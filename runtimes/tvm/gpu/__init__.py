"""The ops as TVM kernels with one GPU schedule: the same code for CUDA, OpenCL and WebGPU."""
