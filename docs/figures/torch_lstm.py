"""Makes tests/lstm_torch.npz: a bidirectional nn.LSTM of PyTorch, its inputs, outputs and every gradient, for tests/models/test_lstm.py.

    .venv-bench/bin/python -m docs.figures.torch_lstm        # only to make them anew: tests need no torch

Clips of 9, 5 and 1 steps go in packed, as PyTorch has it. Names in the file: TYPE/NAME and TYPE/gradient/NAME, TYPE float32 or
float64, NAME a parameter of nn.LSTM or x; TYPE/outputs; weight: of the outputs in the scalar loss; lengths.
"""

from pathlib import Path

import numpy as np
import torch

FIGURES = Path(__file__).resolve().parents[2] / "tests" / "lstm_torch.npz"
LENGTHS, INPUTS, UNITS = (9, 5, 1), 6, 5


def figures(dtype: torch.dtype, x: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Of one type: parameters, inputs, outputs (B, T, 2H) with padding 0, and gradients of (outputs * weight).sum()."""
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
    found = {"outputs": outputs} | leaves | {f"gradient/{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().numpy() for name, value in found.items()}


def main():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(len(LENGTHS), max(LENGTHS), INPUTS)), rng.normal(size=(len(LENGTHS), max(LENGTHS), 2 * UNITS))
    kept = {"lengths": np.int32(LENGTHS), "weight": weight, "torch": np.array(torch.__version__)}
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        kept |= {f"{name}/{k}": v for k, v in figures(dtype, x, weight).items()}
    np.savez_compressed(FIGURES, **kept)
    print(f"{FIGURES}: {FIGURES.stat().st_size} bytes, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
