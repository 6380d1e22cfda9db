"""CPU kernels as TVM PrimFuncs: one op per module, written once, with the instruction set as a value (``Lanes``)."""
