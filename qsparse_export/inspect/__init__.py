"""What is in a model or a bundle: layers, shapes, formats, bytes, sparsity, parity; as a table, JSON or one HTML page."""
