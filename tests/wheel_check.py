"""What an installed wheel is checked with: its compiled kernels, and nothing but numpy. Not a test of pytest's.

    python tests/wheel_check.py

A step of a GRU with each instruction set of this processor equals numpy's.
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def main() -> None:
    import lm
    from lm.kernels.compiled import native

    kernels = native()
    if kernels is None:
        sys.exit(f"{lm.__file__} has no compiled kernels")
    numbers = np.random.default_rng(0)
    vocab_size, embedding_size, hidden_size = 7, 5, 19
    shapes = [(3 * hidden_size, embedding_size), (3 * hidden_size, hidden_size), (3 * hidden_size,), (3 * hidden_size,)]
    layer = tuple(numbers.normal(size=shape).astype(np.float32) for shape in shapes)
    embedding = numbers.normal(size=(vocab_size, embedding_size)).astype(np.float32)
    output = numbers.normal(size=(vocab_size, hidden_size)).astype(np.float32)

    state = np.zeros(hidden_size, np.float32)
    wanted = []
    for token in (3, 1, 4):
        from_input = (layer[0] @ embedding[token] + layer[2]).reshape(3, hidden_size)
        from_state = (layer[1] @ state + layer[3]).reshape(3, hidden_size)
        reset, update = sigmoid(from_input[:2] + from_state[:2])
        state = (1 - update) * np.tanh(from_input[2] + reset * from_state[2]) + update * state
        wanted.append(output @ state)

    for isa in kernels.instruction_sets():
        kernel = kernels.recurrent(
            cell="gru", embedding=embedding, layers=[layer], heads=[(output, None)], tables=[], buckets=1, slots=1,
            threads=2, precision="fp32", isa=isa,
        )  # fmt: skip
        for token, logits in zip((3, 1, 4), wanted, strict=True):
            kernel.step([0], [token])
            np.testing.assert_allclose(kernel.logits[0, :vocab_size], logits, atol=1e-5)
        sys.stdout.write(f"lm {lm.__version__}: a step with {isa} equals numpy's\n")


if __name__ == "__main__":
    main()
