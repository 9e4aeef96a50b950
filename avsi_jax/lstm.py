"""The scanned LSTM layer and its fast gradient.

One parameter tree, that of flax's `LSTMCell` (kernels `ii if ig io`, kernels and biases `hi hf hg ho`), and two ways to scan it:
  separate  four gate products a step, one scan a direction: fastest on a CPU, where XLA pays for splitting a joined product
  joined    one gate product a step, both directions in one scan: fewest, largest operations, for GPU and TPU
Both have a gradient of their own: the backward scan does only the product with the recurrent weights, everything that does not
depend on the carry is computed before it and every weight gradient after it, as one product over all steps. (Hochreiter &
Schmidhuber 1997; gates as in Gers et al. 2000: i, f, o sigmoid, g tanh, c = f c + i g, h = o tanh c.)
Shapes: T steps, B clips, I inputs, H units; time is the leading axis inside, the second one in the public layer.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

GATES = "ifgo"
WAYS = ("auto", "separate", "joined")


def resolve_way(way: str) -> str:
    """'auto' -> the way for this process's backend; ValueError for an unknown one."""
    if way not in WAYS:
        raise ValueError(f"lstm: found {way!r}, expected one of {', '.join(WAYS)}")
    return ("separate" if jax.default_backend() == "cpu" else "joined") if way == "auto" else way


class BidirectionalLSTM(nn.Module):
    """x (B, T, I), lengths (B,) or None -> (B, T, 2 units): forward outputs, then backward ones.

    With lengths the backward direction starts at each clip's last valid step, and outputs at padding are 0, so padding changes
    no valid output. Kernels: Glorot uniform, recurrent: orthogonal, biases 0 but 1 for the forget gate (Keras' choices).
    """

    units: int
    way: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        forward = CellParameters(self.units, name="forward")(x.shape[-1])
        backward = CellParameters(self.units, name="backward")(x.shape[-1])
        reverse = lambda a: reverse_steps(a, lengths)
        pair = [jnp.moveaxis(x, 1, 0), jnp.moveaxis(reverse(x), 1, 0)]  # each (T, B, I)
        if resolve_way(self.way) == "separate":
            out = [scan_separate(a, *w) for a, w in zip(pair, (forward, backward), strict=True)]
        else:
            weights = [jnp.stack(w) for w in zip(forward, backward, strict=True)]
            out = scan_joined(jnp.stack(pair, 1), *weights)
            out = [out[:, 0], out[:, 1]]
        out = [jnp.moveaxis(a, 0, 1) for a in out]
        out = jnp.concatenate([out[0], reverse(out[1])], -1)
        if lengths is None:
            return out
        return jnp.where((jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None], out, 0.0)


class CellParameters(nn.Module):
    """The weights of one direction, named as flax's LSTMCell does: returns Wx (4, I, H), Wh (4, H, H), b (4, H) in order ifgo."""

    units: int

    @nn.compact
    def __call__(self, num_inputs: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = self.units
        gate = lambda g: nn.initializers.ones if g == "f" else nn.initializers.zeros
        wx = [Affine((num_inputs, h), nn.initializers.glorot_uniform(), name=f"i{g}")()[0] for g in GATES]
        wh, b = zip(*[Affine((h, h), nn.initializers.orthogonal(), gate(g), name=f"h{g}")() for g in GATES], strict=True)
        return jnp.stack(wx), jnp.stack(wh), jnp.stack(b)


class Affine(nn.Module):
    """A named kernel and, where `bias_init` is given, a bias; returns both (bias None without)."""

    shape: tuple[int, int]
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self):
        kernel = self.param("kernel", self.kernel_init, self.shape)
        return kernel, None if self.bias_init is None else self.param("bias", self.bias_init, self.shape[1:])


def reverse_steps(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """(B, T, ...) with the first `lengths` steps of each clip reversed and the padding left where it is; its own inverse."""
    if lengths is None:
        return jnp.flip(x, 1)
    step = jnp.arange(x.shape[1])[None]
    index = jnp.where(step < lengths[:, None], lengths[:, None] - 1 - step, step)
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


# ---- one direction, a product a gate -------------------------------------------------------------------------------------------


def _cell(gate, carry):
    """One LSTM step from the four gates' pre-activations; returns the new carry (c, h) and what the gradient needs."""
    c, _ = carry
    i, f, g, o = jax.nn.sigmoid(gate[0]), jax.nn.sigmoid(gate[1]), jnp.tanh(gate[2]), jax.nn.sigmoid(gate[3])
    c = f * c + i * g
    h = o * jnp.tanh(c)
    return (c, h), (h, c, i, f, g, o)


def _run_separate(x, wx, wh, b):
    projected = [x @ wx[k] + b[k, None, None] for k in range(4)]
    step = lambda carry, p: _cell([p[k] + carry[1] @ wh[k] for k in range(4)], carry)
    zero = jnp.zeros((x.shape[1], wh.shape[-1]), x.dtype)
    return jax.lax.scan(step, (zero, zero), projected)[1]


@jax.custom_vjp
def scan_separate(x: jax.Array, wx: jax.Array, wh: jax.Array, b: jax.Array) -> jax.Array:
    """x (T, B, I), Wx (4, I, H), Wh (4, H, H), b (4, H) -> h (T, B, H), from a zero state."""
    return _run_separate(x, wx, wh, b)[0]


def _separate_forward(x, wx, wh, b):
    saved = _run_separate(x, wx, wh, b)
    return saved[0], (x, wx, wh, saved)


def _separate_backward(residual, dy):
    x, wx, wh, saved = residual
    gates_t = jnp.concatenate(list(jnp.swapaxes(wh, 1, 2)))  # (4H, H)
    d = _gate_gradients(saved, dy, lambda d: d @ gates_t)  # (T, B, 4H)
    units, flat = wh.shape[-1], d.reshape(-1, d.shape[-1])
    per_gate = lambda w: jnp.moveaxis(w.reshape(-1, 4, units), 1, 0)
    dwx = per_gate(x.reshape(-1, x.shape[-1]).T @ flat)
    dwh = per_gate(_before(saved[0]).reshape(-1, units).T @ flat)
    dx = (flat @ jnp.concatenate(list(wx), -1).T).reshape(x.shape)
    return dx, dwx, dwh, flat.sum(0).reshape(4, units)


scan_separate.defvjp(_separate_forward, _separate_backward)


def _before(a):
    """What the previous step held: shifted by one along time, zero at the start."""
    return jnp.concatenate([jnp.zeros_like(a[:1]), a[:-1]])


def _gate_gradients(saved, dy, to_previous_h):
    """Gradients by the four gates' pre-activations, (T, ..., 4H), by the scan backwards in time over `to_previous_h`."""
    h, c, i, f, g, o = saved
    tanh_c = jnp.tanh(c)
    by_o, by_c = tanh_c * o * (1 - o), o * (1 - tanh_c**2)
    by_i, by_f, by_g = g * i * (1 - i), _before(c) * f * (1 - f), i * (1 - g**2)

    def step(carry, t):
        dc, dh = carry
        dy, f, by_o, by_c, by_i, by_f, by_g = t
        dh = dh + dy
        dc = dc + dh * by_c
        d = jnp.concatenate([dc * by_i, dc * by_f, dc * by_g, dh * by_o], -1)
        return (dc * f, to_previous_h(d)), d

    zero = jnp.zeros_like(h[0])
    return jax.lax.scan(step, (zero, zero), (dy, f, by_o, by_c, by_i, by_f, by_g), reverse=True)[1]


# ---- both directions, one product ----------------------------------------------------------------------------------------------


def _joined_weights(w):
    """(D, 4, I, H) -> (D, I, 4H)."""
    return jnp.moveaxis(w, 1, 2).reshape(w.shape[0], w.shape[2], -1)


def _run_joined(x, wx, wh, b):
    units = wh.shape[-1]
    projected = jnp.einsum("tdbi,dik->tdbk", x, _joined_weights(wx)) + b.reshape(1, b.shape[0], 1, -1)
    recurrent = _joined_weights(wh)

    def step(carry, p):
        gates = p + jnp.einsum("dbh,dhk->dbk", carry[1], recurrent)
        return _cell([gates[..., k * units : (k + 1) * units] for k in range(4)], carry)

    zero = jnp.zeros((*x.shape[1:3], units), x.dtype)
    return jax.lax.scan(step, (zero, zero), projected)[1]


@jax.custom_vjp
def scan_joined(x: jax.Array, wx: jax.Array, wh: jax.Array, b: jax.Array) -> jax.Array:
    """x (T, D, B, I), Wx (D, 4, I, H), Wh (D, 4, H, H), b (D, 4, H) -> h (T, D, B, H): D directions side by side."""
    return _run_joined(x, wx, wh, b)[0]


def _joined_forward(x, wx, wh, b):
    saved = _run_joined(x, wx, wh, b)
    return saved[0], (x, wx, wh, saved)


def _joined_backward(residual, dy):
    x, wx, wh, saved = residual
    recurrent = _joined_weights(wh)
    d = _gate_gradients(saved, dy, lambda d: jnp.einsum("dbk,dhk->dbh", d, recurrent))
    split = lambda w: jnp.moveaxis(w.reshape(*w.shape[:-1], 4, wh.shape[-1]), 2, 1)  # (D, I, 4H) -> (D, 4, I, H)
    dwx = split(jnp.einsum("tdbi,tdbk->dik", x, d))
    dwh = split(jnp.einsum("tdbh,tdbk->dhk", _before(saved[0]), d))
    dx = jnp.einsum("tdbk,dik->tdbi", d, _joined_weights(wx))
    return dx, dwx, dwh, d.sum((0, 2)).reshape(wh.shape[0], 4, -1)


scan_joined.defvjp(_joined_forward, _joined_backward)
