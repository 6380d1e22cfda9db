"""A ``.pt2`` written by ``torch.export.save``: any module of tensors, as a graph instead of a configuration."""

from __future__ import annotations

from pathlib import Path

from qsparse_export.checkpoints.model import Model, model_name
from qsparse_export.errors import CheckpointError


def read_exported_program(path: Path, *, trust: bool) -> Model:
    """Raises CheckpointError without ``trust``, since torch.export.load unpickles, and when the program cannot be loaded.

    Our custom operators are registered first, so that programs that use them are found complete.
    """
    if not trust:
        raise CheckpointError(
            f"{path} is an exported program (.pt2), and loading one unpickles, which could run any code: pass --trust "
            "(trust=True) if you made it or trust who did, or export the model as .pt, safetensors or GGUF instead"
        )
    import torch

    from qsparse_export.ops import register

    register()
    try:
        program = torch.export.load(path)
    except Exception as error:  # whatever the unpickler or the deserialiser of graphs meets
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be loaded as an exported program ({reason}): it is damaged, was written by another torch than "
            f"{torch.__version__}, or uses custom operators of a library that is not imported"
        ) from error
    return Model.of_program(model_name(path), program, (path,))
