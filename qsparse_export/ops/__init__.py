"""Custom operators: each file holds one op as torch op, ONNX schema, ONNX function body and NumPy reference."""
