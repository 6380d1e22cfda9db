"""Apache TVM as a runtime: the ops as PrimFuncs, whole graphs through Relax."""
