"""Writes tests/models/lstm_torch.npz: inputs, outputs and gradients of a bidirectional nn.LSTM of PyTorch, for test_lstm.py.

    .venv-bench/bin/python -m docs.figures.torch_lstm        # only to write the file again: tests need no torch

Clips of 9, 5 and 1 time steps are passed as a packed sequence. Names in the file: TYPE/NAME and TYPE/gradient/NAME, where TYPE is
float32 or float64 and NAME a parameter of nn.LSTM or x; TYPE/outputs; weight: of the outputs in the scalar loss; lengths.
"""

from pathlib import Path

import numpy as np
import torch

FIGURES = Path(__file__).resolve().parents[2] / "tests" / "models" / "lstm_torch.npz"
LENGTHS, INPUTS, UNITS = (9, 5, 1), 6, 5


def figures(dtype: torch.dtype, x: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters, inputs, outputs (B, T, 2H) with padding 0, and gradients of (outputs * weight).sum(), for one dtype."""
    torch.manual_seed(0)
    layer = torch.nn.LSTM(INPUTS, UNITS, bidirectional=True, batch_first=True, dtype=torch.float64)
    for name, value in layer.named_parameters():
        torch.nn.init.zeros_(value) if "bias_ih" in name else torch.nn.init.normal_(value, std=0.5)
    layer.to(dtype)
    inputs = torch.tensor(x, dtype=dtype, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(inputs, LENGTHS, batch_first=True)
    outputs = torch.nn.utils.rnn.pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[1])[0]
    (outputs * torch.tensor(weight, dtype=dtype)).sum().backward()
    leaves = dict(layer.named_parameters()) | {"x": inputs}
    arrays = {"outputs": outputs} | leaves | {f"gradient/{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().numpy() for name, value in arrays.items()}


def main() -> None:
    """Writes the file."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(len(LENGTHS), max(LENGTHS), INPUTS)), rng.normal(size=(len(LENGTHS), max(LENGTHS), 2 * UNITS))
    contents = {"lengths": np.int32(LENGTHS), "weight": weight, "torch": np.array(torch.__version__)}
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        contents |= {f"{name}/{k}": v for k, v in figures(dtype, x, weight).items()}
    np.savez_compressed(FIGURES, **contents)
    print(f"{FIGURES}: {FIGURES.stat().st_size} bytes, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
