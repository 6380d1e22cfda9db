"""What is exported for Node and the browser: model of counting_models and ``--weights``."""

CASES = {"bitnet": ("bitnet", "keep"), "int4": ("qsparse", "int4"), "fp16": ("qsparse", "fp16")}
