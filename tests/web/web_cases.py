"""What is exported for Node and the browser: model of counting_models, and options."""

CASES = {
    "bitnet": ("bitnet", {}),
    "int4": ("qsparse", {"weights": "int4", "logits": "last"}),
    "fp16": ("qsparse", {"weights": "fp16"}),
}
