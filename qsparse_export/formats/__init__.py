"""Packed weight formats; the C++ twin of each is in runtimes/kernels/include/qsk/."""

FORMATS = {
    "ternary": "2-bit weights -1, 0, 1, input-channel-major, rows padded to 128 outputs; one scale per matrix",
    "nbits channels": "4- or 8-bit weights, input-channel-major, rows padded to 64 outputs; a float16 scale per group of inputs",
    "nbits outputs": "4- or 8-bit weights, output-major, for head and embedding; a float16 scale per group of inputs",
}
