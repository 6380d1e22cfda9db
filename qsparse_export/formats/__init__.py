"""Packed weight formats; the C++ twin of each is in runtimes/kernels/include/qsk/."""

FORMATS = {
    "ternary": "2-bit weights -1, 0, 1, input-channel-major, rows padded to 128 outputs; one scale per matrix",
}
