"""Q-Sparse layers and decoder in PyTorch: trainable (straight-through gradients) and exportable.

``decoder.Decoder(config)`` or ``sparsify.sparsify(any_module, rules)`` to train; ``deploy.deploy(module)`` to export.
"""
