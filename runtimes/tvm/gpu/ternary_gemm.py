"""Dense ternary GEMM on a GPU, for many rows: blocks of 64 rows and 128 outputs, 64 channels a step in shared memory."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.formats.ternary import TILE_OUTPUTS
from qsparse_export.runtimes.tvm.gpu.group_sums import GROUPS, LANES
from qsparse_export.runtimes.tvm.gpu.joined import Joined
from qsparse_export.runtimes.tvm.gpu.packed_bytes import Dot, transposed
from qsparse_export.runtimes.tvm.gpu.ternary_gemv import CODES, WORD_OUTPUTS, descaled
from qsparse_export.runtimes.tvm.gpu.workgroup import (
    THREADS,
    assign,
    barrier,
    ceil_div,
    kernel,
    local,
    shared,
    threads,
    when,
)

ROWS = 64
STEP_WORDS = 16
"""Of a row of quantised activations in a step: 64 channels."""
TILE_WORDS = TILE_OUTPUTS // WORD_OUTPUTS
THREAD_ROWS = ROWS // GROUPS
THREAD_OUTPUTS = TILE_OUTPUTS // LANES


def products(k_in: int, width: int, joined: Joined, dtype: str, dot: Dot) -> tirx.PrimFunc:
    """The kernel from "q" with rows of ``width`` words, "w", "counts", "gamma" and "scales" to "y"."""
    words = joined.columns // WORD_OUTPUTS

    def body() -> None:
        m = tirx.Var("m", "int32")
        q = T.arg("q", T.buffer((m, width), "int32"))
        w = T.arg("w", T.buffer((k_in, words), "uint32"))
        counts = T.arg("counts", T.buffer((m, 2), "int32"))
        gamma = T.arg("gamma", T.buffer((m, 2), "float32"))
        scales = T.arg("scales", T.buffer((joined.count,), "float32"))
        y = T.arg("y", T.buffer((m, joined.outputs), dtype))
        with threads(ceil_div(m, ROWS), joined.columns // TILE_OUTPUTS) as (block, tile, thread):
            group, lane = T.bind(thread // LANES), T.bind(thread % LANES)
            rows = shared((ROWS, STEP_WORDS), "uint32")
            codes = shared((STEP_WORDS, TILE_OUTPUTS), "uint32")
            total = local(THREAD_ROWS * THREAD_OUTPUTS, "int32", 0)
            with T.serial(0, width // STEP_WORDS) as step:
                for i in range(ROWS * STEP_WORDS // THREADS):
                    row = T.bind((thread + THREADS * i) // STEP_WORDS)
                    word = T.bind((thread + THREADS * i) % STEP_WORDS)
                    values = q[T.min(block * ROWS + row, m - 1), step * STEP_WORDS + word]
                    assign(rows, T.Cast("uint32", values), row, word)
                _load_codes(w, k_in, codes, step, tile, thread)
                barrier()
                with T.serial(0, STEP_WORDS) as word:
                    own = [T.bind(rows[group * THREAD_ROWS + i, word]) for i in range(THREAD_ROWS)]
                    for j in range(THREAD_OUTPUTS):
                        code = T.bind(codes[word, lane + LANES * j])
                        for i, values in enumerate(own):
                            number = i * THREAD_OUTPUTS + j
                            assign(total, dot(code, values, total[number]), number)
                barrier()
            for i in range(THREAD_ROWS):
                row = T.bind(block * ROWS + group * THREAD_ROWS + i)
                for matrix in joined.matrices:
                    for j in range(THREAD_OUTPUTS):
                        output = T.bind(tile * TILE_OUTPUTS + (lane + LANES * j) - matrix.first_column)
                        with when(tirx.all(row < m, output >= 0, output < matrix.outputs)):
                            value = total[i * THREAD_OUTPUTS + j] - counts[row, 0]
                            result = descaled(value, gamma[row, 1], scales[matrix.number], dtype)
                            assign(y, result, row, matrix.first_output + output)

    return kernel("ternary_gemm", body)


def _load_codes(
    w: tirx.Buffer, k_in: int, codes: tirx.Buffer, step: tirx.Expr, tile: tirx.Expr, thread: tirx.Expr
) -> None:
    """A thread turns a word of four channels into 16 words of four codes, one for each output."""
    with when(thread < STEP_WORDS * TILE_WORDS):
        four, word = T.bind(thread // TILE_WORDS), T.bind(thread % TILE_WORDS)
        loaded = []
        for i in range(4):
            channel = T.bind(step * (4 * STEP_WORDS) + four * 4 + i)
            # Beyond the last channel rows are 0, so that any code will do.
            loaded.append(T.bind(w[T.min(channel, k_in - 1), tile * TILE_WORDS + word]))
        for byte, word_of_byte in enumerate(transposed(loaded)):
            for plane in range(4):
                output = word * WORD_OUTPUTS + (4 * byte + plane)
                assign(codes, word_of_byte >> T.uint32(2 * plane) & T.uint32(CODES), four, output)
