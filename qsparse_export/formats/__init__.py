"""Packed weight formats; the C++ twin of each is in runtimes/kernels/include/qsk/."""
