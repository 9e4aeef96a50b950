"""The scanned LSTM layer, its fast gradient, and the ways to run it.

One parameter tree, that of flax's `LSTMCell` (kernels `ii if ig io`, kernels and biases `hi hf hg ho`), and three ways:
  separate  four gate products a step, one scan a direction: fastest on a CPU, where XLA pays for splitting a joined product
  joined    one gate product a step, both directions in one scan: fewest, largest operations, for GPU and TPU
  cudnn     NVIDIA's fused kernel, both directions in one call; float32 only
The scans have a gradient of their own: the backward scan does only the product with the recurrent weights, every weight gradient
comes after it as one product over all steps. (Hochreiter & Schmidhuber 1997; gates as in Gers et al. 2000: i, f, o sigmoid, g tanh,
c = f c + i g, h = o tanh c.) docs/performance.md says what each choice was worth.
Padding: gates i, f, o are shut where a clip has ended, so the state is 0 there, whichever side a scan comes from; nothing is moved.
Shapes: T steps, B clips, I inputs, H units; time is the leading axis inside, the second one in the public layer.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

GATES = "ifgo"
WAYS = ("auto", "separate", "joined", "cudnn")
DTYPES = ("float32", "bfloat16")
CLOSED = -1e9  # a sigmoid of it is exactly 0


def resolve_way(way: str, dtype: str = "float32") -> str:
    """'auto' -> the way for this process's backend; ValueError for one that is unknown or cannot be had here.

    On a GPU 'auto' is 'joined': 'cudnn' has not been measured there yet (benchmarks/speed/train_step.py does it).
    """
    if way not in WAYS:
        raise ValueError(f"lstm: found {way!r}, expected one of {', '.join(WAYS)}")
    if dtype not in DTYPES:
        raise ValueError(f"lstm dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if way == "cudnn" and dtype != "float32":
        raise ValueError(f"lstm 'cudnn': found dtype {dtype!r}, expected 'float32', all that it takes; or lstm 'joined'")
    if way == "cudnn" and not has_cudnn():
        raise ValueError(f"lstm 'cudnn': found {jax.devices()[0].device_kind}, expected an NVIDIA GPU; or lstm 'auto'")
    return ("separate" if jax.default_backend() == "cpu" else "joined") if way == "auto" else way


def has_cudnn() -> bool:
    """Whether this process computes on NVIDIA GPUs."""
    return jax.default_backend() == "gpu" and "nvidia" in jax.devices()[0].device_kind.lower()


class BidirectionalLSTM(nn.Module):
    """x (B, T, I), lengths (B,) or None -> (B, T, 2 units): forward outputs, then backward ones, in the type of x.

    With lengths the backward direction starts at each clip's last valid step, and outputs at padding are 0, so padding changes
    no valid output. Kernels: Glorot uniform, recurrent: orthogonal, biases 0 but 1 for the forget gate (Keras' choices).
    dtype 'bfloat16': products of bfloat16 factors, added up in float32; parameters, gates and the carried c stay float32.
    'float32': everything in the type of x and the parameters (float64 under x64).
    """

    units: int
    way: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        way = resolve_way(self.way, self.dtype)
        forward = CellParameters(self.units, name="forward")(x.shape[-1])
        backward = CellParameters(self.units, name="backward")(x.shape[-1])
        if way == "cudnn":
            return run_cudnn(x, lengths, forward, backward)
        seen = jnp.moveaxis(x, 1, 0)  # (T, B, I)
        seen = seen.astype(jnp.bfloat16) if self.dtype == "bfloat16" else seen
        ended = None if lengths is None else (jnp.arange(x.shape[1])[:, None] >= lengths[None])[..., None]  # (T, B, 1)
        run = run_separate if way == "separate" else run_joined
        return jnp.moveaxis(jnp.concatenate(run(seen, ended, forward, backward), -1), 0, 1).astype(x.dtype)


def run_separate(x, ended, forward, backward) -> list[jax.Array]:
    """x (T, B, I), ended (T, B, 1) or None, weights of both directions -> [h (T, B, H) forward, backward]."""
    return [scan_separate(backwards, x, *w, ended) for backwards, w in ((False, forward), (True, backward))]


def run_joined(x, ended, forward, backward) -> list[jax.Array]:
    """As `run_separate`."""
    weights = [jnp.stack(w) for w in zip(forward, backward, strict=True)]
    pair = lambda a: None if a is None else jnp.stack([a, jnp.flip(a, 0)], 1)
    out = scan_joined(pair(x), *weights, pair(ended))
    return [out[:, 0], jnp.flip(out[:, 1], 0)]


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


# ---- what both scans share -----------------------------------------------------------------------------------------------------


def _sum_type(x):
    """The type in which products are added up, gates are computed and c is carried."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _product(form, a, b):
    """einsum of `a` with `b` brought to its type, added up in `_sum_type`."""
    exact = lambda a, b: jnp.einsum(form, a, b, preferred_element_type=_sum_type(a))
    if a.dtype != jnp.bfloat16:
        return exact(a, b.astype(a.dtype))
    # XLA's CPU lacks products of bfloat16 into float32 in some forms: there the same numbers go in as float32.
    widened = lambda a, b: jnp.einsum(form, a.astype(jnp.float32), b.astype(jnp.float32))
    return jax.lax.platform_dependent(a, b.astype(a.dtype), cpu=widened, default=exact)


def _shut(gates, ended):
    """Pre-activations of the four gates with i, f, o closed, and g 0, where a clip has ended: the state is 0 there."""
    if ended is None:
        return gates
    return [jnp.where(ended, 0.0 if name == "g" else CLOSED, gate) for name, gate in zip(GATES, gates, strict=True)]


def _cell(gates, carry, small):
    """One step from the gates' pre-activations: the new carry (c, h) and what the gradient needs, h and gates in type `small`."""
    before, _ = carry
    i, f, g, o = jax.nn.sigmoid(gates[0]), jax.nn.sigmoid(gates[1]), jnp.tanh(gates[2]), jax.nn.sigmoid(gates[3])
    c = f * before + i * g
    h = (o * jnp.tanh(c)).astype(small)
    return (c, h), (h, before, *(a.astype(small) for a in (i, f, g, o)))


def _slopes(before, i, f, g, o):
    """Of one step or of all: d(c, gates' pre-activations)/d(c or h), in the order that `_gate_gradients` takes."""
    i, f, g, o = (a.astype(before.dtype) for a in (i, f, g, o))
    tanh_c = jnp.tanh(f * before + i * g)
    return f, g * i * (1 - i), before * f * (1 - f), i * (1 - g**2), tanh_c * o * (1 - o), o * (1 - tanh_c**2)


def _gate_gradients(saved, dy, to_previous_h, *, slopes_of, reverse):
    """Gradients by the four gates' pre-activations, (T, ..., 4H) in the type of dy, by the scan against the direction of the first.

    `slopes_of` makes slopes of what was `saved` a step; `to_previous_h` is the product with the recurrent weights.
    """

    def step(carry, t):
        dc, dh = carry
        f, by_i, by_f, by_g, by_o, by_c = slopes_of(*t[1])
        dh = dh + t[0]
        dc = dc + dh * by_c
        d = jnp.concatenate([dc * by_i, dc * by_f, dc * by_g, dh * by_o], -1).astype(dy.dtype)
        return (dc * f, to_previous_h(d)), d

    zero = jnp.zeros(dy.shape[1:], _sum_type(dy))
    return jax.lax.scan(step, (zero, zero), (dy, saved), reverse=reverse)[1]


def _before(h, backwards):
    """What the step before held, (T, ..., H): shifted by one along time, zero at the start."""
    zero = jnp.zeros_like(h[:1])
    return jnp.concatenate([h[1:], zero] if backwards else [zero, h[:-1]])


# ---- one direction, a product a gate -------------------------------------------------------------------------------------------


def _scan_separate(backwards, x, wx, wh, b, ended):
    projected = _shut([_product("tbi,ih->tbh", x, wx[k]) + b[k, None, None] for k in range(4)], ended)
    recurrent = [wh[k].astype(x.dtype) for k in range(4)]  # cut apart here: in the loop XLA would copy them in every step
    step = lambda carry, p: _cell([p[k] + _product("bh,hk->bk", carry[1], recurrent[k]) for k in range(4)], carry, x.dtype)
    zero = jnp.zeros((x.shape[1], wh.shape[-1]), x.dtype)
    return jax.lax.scan(step, (zero.astype(_sum_type(x)), zero), projected, reverse=backwards)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_separate(backwards: bool, x, wx, wh, b, ended=None) -> jax.Array:
    """x (T, B, I), Wx (4, I, H), Wh (4, H, H), b (4, H), ended (T, B, 1) bool -> h (T, B, H), from a zero state."""
    return _scan_separate(backwards, x, wx, wh, b, ended)[0]


def _separate_forward(backwards, x, wx, wh, b, ended):
    h, *saved = _scan_separate(backwards, x, wx, wh, b, ended)
    return h, (x, wx, wh, h, saved)


def _separate_backward(backwards, residual, dy):
    x, wx, wh, h, saved = residual
    across = jnp.concatenate(list(jnp.swapaxes(wh, 1, 2)))  # (4H, H)
    back = functools.partial(_product, "bk,kh->bh", b=across.astype(dy.dtype))
    d = _gate_gradients(saved, dy, back, slopes_of=_slopes, reverse=not backwards)  # (T, B, 4H)
    d = d.reshape(-1, d.shape[-1])
    dx = _product("nk,ik->ni", d, jnp.concatenate(list(wx), -1)).astype(x.dtype).reshape(x.shape)
    per_gate = lambda w: jnp.moveaxis(w.reshape(-1, 4, wh.shape[-1]), 1, 0)
    dwx = per_gate(_product("in,nk->ik", _turned(x), d)).astype(wx.dtype)
    dwh = per_gate(_product("hn,nk->hk", _turned(_before(h, backwards)), d)).astype(wh.dtype)
    return dx, dwx, dwh, d.sum(0, dtype=_sum_type(x)).reshape(4, -1), None


def _turned(a):
    """(T, B, N) -> (N, T B), in memory too: XLA's CPU products that contract the first axis of both factors run at half speed."""
    return jax.lax.optimization_barrier(a.reshape(-1, a.shape[-1]).T)


scan_separate.defvjp(_separate_forward, _separate_backward)


# ---- both directions, one product ----------------------------------------------------------------------------------------------


def _joined_weights(w):
    """(D, 4, I, H) -> (D, I, 4H)."""
    return jnp.moveaxis(w, 1, 2).reshape(w.shape[0], w.shape[2], -1)


def _scan_joined(x, wx, wh, b, ended):
    split = lambda a: jnp.split(a, 4, axis=-1)
    # A product a direction: of one for both, a TPU would bring every step's slice to another layout (docs/tpu.md).
    projected = [_product("tbi,ik->tbk", x[:, d], w) + b[d].reshape(1, 1, -1) for d, w in enumerate(_joined_weights(wx))]
    if ended is not None:
        projected = [jnp.concatenate(_shut(split(p), ended[:, d]), -1) for d, p in enumerate(projected)]
    projected = jnp.stack(projected, 1)
    recurrent = _joined_weights(wh).astype(x.dtype)
    step = lambda carry, p: _cell(split(p + _product("dbh,dhk->dbk", carry[1], recurrent)), carry, x.dtype)
    zero = jnp.zeros((*x.shape[1:3], wh.shape[-1]), x.dtype)
    return jax.lax.scan(step, (zero.astype(_sum_type(x)), zero), projected)[1]


@jax.custom_vjp
def scan_joined(x: jax.Array, wx: jax.Array, wh: jax.Array, b: jax.Array, ended: jax.Array | None = None) -> jax.Array:
    """x (T, D, B, I), Wx (D, 4, I, H), Wh (D, 4, H, H), b (D, 4, H), ended (T, D, B, 1) bool -> h (T, D, B, H).

    D directions side by side, each from a zero state at step 0: the backward one is given flipped.
    """
    return _scan_joined(x, wx, wh, b, ended)[0]


def _joined_forward(x, wx, wh, b, ended):
    h, *saved = _scan_joined(x, wx, wh, b, ended)
    return h, (x, wx, wh, h, saved)


def _joined_backward(residual, dy):
    x, wx, wh, h, saved = residual
    back = functools.partial(_product, "dbk,dhk->dbh", b=_joined_weights(wh).astype(dy.dtype))
    d = _gate_gradients(_slopes(*saved), dy, back, slopes_of=lambda *slopes: slopes, reverse=True)
    split = lambda w: jnp.moveaxis(w.reshape(*w.shape[:-1], 4, wh.shape[-1]), 2, 1).astype(wh.dtype)  # (D, I, 4H) -> (D, 4, I, H)
    dwx = split(_product("tdbi,tdbk->dik", x, d))
    dwh = split(_product("tdbh,tdbk->dhk", _before(h, False), d))
    dx = _product("tdbk,dik->tdbi", d, _joined_weights(wx)).astype(x.dtype)
    return dx, dwx, dwh, d.sum((0, 2), dtype=_sum_type(x)).reshape(wh.shape[0], 4, -1), None


scan_joined.defvjp(_joined_forward, _joined_backward)


# ---- NVIDIA's kernel -----------------------------------------------------------------------------------------------------------


def run_cudnn(x, lengths, forward, backward) -> jax.Array:
    """x (B, T, I) float32, lengths (B,) or None, weights of both directions -> (B, T, 2H).

    Products in TF32 unless jax.default_matmul_precision says 'highest', as all others on such a GPU.
    """
    from jax.experimental import rnn

    if x.dtype != jnp.float32:
        raise ValueError(f"lstm 'cudnn': found inputs of {x.dtype}, expected float32, all that it takes; or lstm 'joined'")
    clips, steps, inputs = x.shape
    units = forward[1].shape[-1]
    lengths = jnp.full((clips,), steps) if lengths is None else lengths
    zero = jnp.zeros((2, clips, units), x.dtype)
    # cuDNN takes no clip of length 0; what it makes of a step of padding is put to 0 with the rest.
    run = rnn.lstm(x, zero, zero, flat_weights(forward, backward), jnp.maximum(lengths, 1).astype(jnp.int32),
                   inputs, units, 1, 0.0, True)  # fmt: skip
    return jnp.where((jnp.arange(steps)[None] < lengths[:, None])[..., None], run[0], 0.0)


def flat_weights(*directions) -> jax.Array:
    """cuDNN's one vector: the kernels of every direction, outputs first (4H, I) and (4H, H), then every direction's two biases.

    We have one bias a gate, at the recurrent product; the input's is 0.
    """
    kernels = [jnp.swapaxes(w, 1, 2).ravel() for wx, wh, _ in directions for w in (wx, wh)]
    biases = [a.ravel() for _, _, b in directions for a in (jnp.zeros_like(b), b)]
    return jnp.concatenate(kernels + biases)
