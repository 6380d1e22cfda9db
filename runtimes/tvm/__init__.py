"""Apache TVM as a runtime: kernels as PrimFuncs, whole models through Relax."""
