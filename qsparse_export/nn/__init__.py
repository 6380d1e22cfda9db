"""Q-Sparse layers and decoder in PyTorch: trainable and exportable."""
