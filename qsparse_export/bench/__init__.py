"""Measures kernels beside their peers and beside the machine's own limits; needs numpy, onnx and onnxruntime only."""
