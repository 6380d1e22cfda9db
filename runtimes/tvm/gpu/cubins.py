"""Machine code for NVIDIA GPUs inside another file: which architectures it is for."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

ELF_MAGIC = b"\x7fELF"
ELF_MACHINE_CUDA = 190
HEADER_BYTES = 64


def cubin_architectures(content: bytes) -> Iterator[str]:
    """``sm_NN`` of each cubin that lies uncompressed in ``content``, in order: an ELF header of the machine CUDA, which
    has the architecture in its flags (as CUDA 13 writes them: bits 8 to 15).
    """
    for found in re.finditer(re.escape(ELF_MAGIC), content):
        header = content[found.start() : found.start() + HEADER_BYTES]
        if len(header) == HEADER_BYTES and struct.unpack_from("<H", header, 18)[0] == ELF_MACHINE_CUDA:
            yield f"sm_{struct.unpack_from('<I', header, 48)[0] >> 8 & 0xFF}"
