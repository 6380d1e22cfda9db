"""Measures kernels beside their peers and the machine's own limits, and whole models; needs no PyTorch."""
