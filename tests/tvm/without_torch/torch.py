"""In the path of the farm's processes: TVM imports PyTorch where it is, which takes seconds, and no device has it."""

raise ImportError("a device of the farm has no PyTorch")
