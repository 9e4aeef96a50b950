"""Bidirectional LSTM layer with a custom gradient and three implementations.

The parameter tree is that of flax's `LSTMCell`: kernels `ii if ig io`, kernels and biases `hi hf hg ho`. Implementations:
  separate  four gate products per time step, one scan per direction: fastest on a CPU, where splitting a joined product is slow
  joined    one gate product per time step, both directions in one scan: few large operations, for GPU and TPU
  cudnn     NVIDIA's fused kernel, both directions in one call; float32 only
The scans have a custom gradient: the backward scan computes only the product with the recurrent weights, and every weight gradient
follows as one product over all time steps. docs/performance.md has the measured gains.
Cell (Hochreiter & Schmidhuber 1997; gates as in Gers et al. 2000): i, f, o sigmoid, g tanh, c = f c + i g, h = o tanh c.
Padding: the gates i, f and o are closed after the end of a clip, so the state is 0 there in both directions and no data is moved.
Letters: T time steps, B clips, I inputs, H units, D directions. Time is the first axis inside, the second one in the public layer.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

GATES = "ifgo"
IMPLEMENTATIONS = ("auto", "separate", "joined", "cudnn")
DTYPES = ("float32", "bfloat16")
INITS = ("flax", "keras", "keras_orthogonal")  # keras_orthogonal: the input weights are orthogonal too
CLOSED = -1e9  # its sigmoid is exactly 0


def resolve_implementation(name: str, dtype: str = "float32") -> str:
    """Replaces 'auto' by the implementation for this process's backend; ValueError for one that is unknown or not available.

    On a GPU 'auto' is 'joined': 'cudnn' has not been compared with it there yet (benchmarks/speed/train_step.py does it).
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"lstm: found {name!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    if dtype not in DTYPES:
        raise ValueError(f"lstm dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if name == "cudnn" and dtype != "float32":
        raise ValueError(f"lstm 'cudnn': found dtype {dtype!r}, expected 'float32', the only one it supports; or use lstm 'joined'")
    if name == "cudnn" and not has_cudnn():
        raise ValueError(f"lstm 'cudnn': found {jax.devices()[0].device_kind}, expected an NVIDIA GPU; or use lstm 'auto'")
    return ("separate" if jax.default_backend() == "cpu" else "joined") if name == "auto" else name


def has_cudnn() -> bool:
    """Whether the default backend of this process is an NVIDIA GPU."""
    return jax.default_backend() == "gpu" and "nvidia" in jax.devices()[0].device_kind.lower()


class BidirectionalLSTM(nn.Module):
    """x (B, T, I), lengths (B,) or None -> (B, T, 2 units): forward outputs, then backward ones, in the type of x.

    With lengths, the backward direction starts at the last valid time step of each clip, and outputs at padding are 0; padding does
    not change any valid output. Initial values: kernels Glorot uniform, recurrent kernels orthogonal, biases 0, those of the forget
    gate 1; drawn for each gate (initial 'flax') or for all gates of a direction together (initial 'keras').
    dtype 'bfloat16': factors of the products in bfloat16, sums in float32; parameters, gates and c stay float32.
    dtype 'float32': everything in the type of x and the parameters (float64 under x64).
    """

    units: int
    implementation: str = "auto"
    dtype: str = "float32"
    initial: str = "flax"  # one of INITS

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        implementation = resolve_implementation(self.implementation, self.dtype)
        forward = CellParameters(self.units, self.initial, name="forward")(x.shape[-1])
        backward = CellParameters(self.units, self.initial, name="backward")(x.shape[-1])
        if implementation == "cudnn":
            return run_cudnn(x, lengths, forward, backward)
        inputs = jnp.moveaxis(x, 1, 0)  # (T, B, I)
        inputs = inputs.astype(jnp.bfloat16) if self.dtype == "bfloat16" else inputs
        ended = None if lengths is None else (jnp.arange(x.shape[1])[:, None] >= lengths[None])[..., None]  # (T, B, 1)
        run = run_separate if implementation == "separate" else run_joined
        return jnp.moveaxis(jnp.concatenate(run(inputs, ended, forward, backward), -1), 0, 1).astype(x.dtype)


Weights = tuple[jax.Array, jax.Array, jax.Array]  # Wx (4, I, H), Wh (4, H, H), b (4, H) of one direction


def run_separate(x: jax.Array, ended: jax.Array | None, forward: Weights, backward: Weights) -> list[jax.Array]:
    """x (T, B, I), ended (T, B, 1) or None, weights of both directions -> [h (T, B, H) forward, backward]."""
    return [scan_separate(reverse, x, *w, ended) for reverse, w in ((False, forward), (True, backward))]


def run_joined(x: jax.Array, ended: jax.Array | None, forward: Weights, backward: Weights) -> list[jax.Array]:
    """As `run_separate`, both directions in one scan."""
    weights = [jnp.stack(w) for w in zip(forward, backward, strict=True)]
    pair = lambda a: None if a is None else jnp.stack([a, jnp.flip(a, 0)], 1)
    out = scan_joined(pair(x), *weights, pair(ended))
    return [out[:, 0], jnp.flip(out[:, 1], 0)]


class CellParameters(nn.Module):
    """Weights of one direction, named as in flax's LSTMCell; returns Wx (4, I, H), Wh (4, H, H), b (4, H), gates in order ifgo.

    With another `initial` than 'flax' the weights of all gates are drawn as one matrix, as Keras does it: (I, 4 H) and (H, 4 H).
    """

    units: int
    initial: str = "flax"

    @nn.compact
    def __call__(self, num_inputs: int) -> Weights:
        h = self.units
        gate = lambda g: nn.initializers.ones if g == "f" else nn.initializers.zeros
        input_init, recurrent_init = nn.initializers.glorot_uniform(), nn.initializers.orthogonal()
        inits = {g: (input_init, recurrent_init) for g in GATES}
        if self.initial != "flax" and self.is_initializing():
            input_init = recurrent_init if self.initial == "keras_orthogonal" else input_init
            shapes = ((num_inputs, 4 * h), (h, 4 * h))
            drawn = [init(self.make_rng("params"), s) for init, s in zip((input_init, recurrent_init), shapes, strict=True)]
            parts = zip(*(jnp.split(matrix, 4, axis=1) for matrix in drawn), strict=True)
            inits = {g: tuple(_constant(x) for x in part) for g, part in zip(GATES, parts, strict=True)}
        wx = [Affine((num_inputs, h), inits[g][0], name=f"i{g}")()[0] for g in GATES]
        wh, b = zip(*[Affine((h, h), inits[g][1], gate(g), name=f"h{g}")() for g in GATES], strict=True)
        return jnp.stack(wx), jnp.stack(wh), jnp.stack(b)


def _constant(value: jax.Array) -> nn.initializers.Initializer:
    """An initialiser that returns `value`."""
    return lambda key, shape, dtype=jnp.float32: value.astype(dtype)


class Affine(nn.Module):
    """A named kernel and, if `bias_init` is given, a bias; returns both, None for a missing bias."""

    shape: tuple[int, int]
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param("kernel", self.kernel_init, self.shape)
        return kernel, None if self.bias_init is None else self.param("bias", self.bias_init, self.shape[1:])


# ---- shared by both scans ------------------------------------------------------------------------------------------------------


def _sum_type(x):
    """The type of sums of products, gates and c."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _product(form, a, b):
    """einsum of `a` with `b` cast to the type of `a`, accumulated in `_sum_type`."""
    exact = lambda a, b: jnp.einsum(form, a, b, preferred_element_type=_sum_type(a))
    if a.dtype != jnp.bfloat16:
        return exact(a, b.astype(a.dtype))
    # XLA lacks some products of bfloat16 into float32 on the CPU: there the same values are multiplied as float32.
    widened = lambda a, b: jnp.einsum(form, a.astype(jnp.float32), b.astype(jnp.float32))
    return jax.lax.platform_dependent(a, b.astype(a.dtype), cpu=widened, default=exact)


def _close_gates(gates, ended):
    """Pre-activations of the four gates with i, f, o closed and g 0 after the end of a clip, so that the state is 0 there."""
    if ended is None:
        return gates
    return [jnp.where(ended, 0.0 if name == "g" else CLOSED, gate) for name, gate in zip(GATES, gates, strict=True)]


def _cell(gates, carry, dtype):
    """One time step from the gates' pre-activations: the new carry (c, h), and what the gradient needs; h and gates in `dtype`."""
    previous_c, _ = carry
    i, f, g, o = jax.nn.sigmoid(gates[0]), jax.nn.sigmoid(gates[1]), jnp.tanh(gates[2]), jax.nn.sigmoid(gates[3])
    c = f * previous_c + i * g
    h = (o * jnp.tanh(c)).astype(dtype)
    return (c, h), (h, previous_c, *(a.astype(dtype) for a in (i, f, g, o)))


def _derivatives(previous_c, i, f, g, o):
    """Derivatives of one time step or of all: (dc/dprevious_c, dc/d(pre-activation of i, f, g), dh/d(that of o), dh/dc)."""
    i, f, g, o = (a.astype(previous_c.dtype) for a in (i, f, g, o))
    tanh_c = jnp.tanh(f * previous_c + i * g)
    return f, g * i * (1 - i), previous_c * f * (1 - f), i * (1 - g**2), tanh_c * o * (1 - o), o * (1 - tanh_c**2)


def _gate_gradients(saved, dy, to_previous_h, *, derivatives_of, reverse):
    """Gradients with respect to the gates' pre-activations, (T, ..., 4H) in the type of dy, by a scan in the opposite direction.

    `derivatives_of` computes the derivatives of a time step from the `saved` values; `to_previous_h` applies the recurrent weights.
    """

    def step(carry, t):
        dc, dh = carry
        f, by_i, by_f, by_g, by_o, by_c = derivatives_of(*t[1])
        dh = dh + t[0]
        dc = dc + dh * by_c
        d = jnp.concatenate([dc * by_i, dc * by_f, dc * by_g, dh * by_o], -1).astype(dy.dtype)
        return (dc * f, to_previous_h(d)), d

    zero = jnp.zeros(dy.shape[1:], _sum_type(dy))
    return jax.lax.scan(step, (zero, zero), (dy, saved), reverse=reverse)[1]


def _previous(h, backwards):
    """The states of the previous time step, (T, ..., H): shifted by one along time, zero at the start."""
    zero = jnp.zeros_like(h[:1])
    return jnp.concatenate([h[1:], zero] if backwards else [zero, h[:-1]])


# ---- separate: one direction, one product per gate -----------------------------------------------------------------------------


def _scan_separate(backwards, x, wx, wh, b, ended):
    projected = _close_gates([_product("tbi,ih->tbh", x, wx[k]) + b[k, None, None] for k in range(4)], ended)
    recurrent = [wh[k].astype(x.dtype) for k in range(4)]  # split here: inside the loop XLA would copy them in every time step
    step = lambda carry, p: _cell([p[k] + _product("bh,hk->bk", carry[1], recurrent[k]) for k in range(4)], carry, x.dtype)
    zero = jnp.zeros((x.shape[1], wh.shape[-1]), x.dtype)
    return jax.lax.scan(step, (zero.astype(_sum_type(x)), zero), projected, reverse=backwards)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_separate(backwards: bool, x, wx, wh, b, ended=None) -> jax.Array:
    """One direction from a zero state: x (T, B, I), Wx (4, I, H), Wh (4, H, H), b (4, H), ended (T, B, 1) bool -> h (T, B, H)."""
    return _scan_separate(backwards, x, wx, wh, b, ended)[0]


def _separate_forward(backwards, x, wx, wh, b, ended):
    h, *saved = _scan_separate(backwards, x, wx, wh, b, ended)
    return h, (x, wx, wh, h, saved)


def _separate_backward(backwards, residual, dy):
    x, wx, wh, h, saved = residual
    transposed = jnp.concatenate(list(jnp.swapaxes(wh, 1, 2)))  # (4H, H)
    to_previous_h = functools.partial(_product, "bk,kh->bh", b=transposed.astype(dy.dtype))
    d = _gate_gradients(saved, dy, to_previous_h, derivatives_of=_derivatives, reverse=not backwards)  # (T, B, 4H)
    d = d.reshape(-1, d.shape[-1])
    dx = _product("nk,ik->ni", d, jnp.concatenate(list(wx), -1)).astype(x.dtype).reshape(x.shape)
    per_gate = lambda w: jnp.moveaxis(w.reshape(-1, 4, wh.shape[-1]), 1, 0)
    dwx = per_gate(_product("in,nk->ik", _transposed(x), d)).astype(wx.dtype)
    dwh = per_gate(_product("hn,nk->hk", _transposed(_previous(h, backwards)), d)).astype(wh.dtype)
    return dx, dwx, dwh, d.sum(0, dtype=_sum_type(x)).reshape(4, -1), None


def _transposed(a):
    """(T, B, N) -> (N, T B), copied in memory: on a CPU, products that contract the first axes of both factors are slow."""
    return jax.lax.optimization_barrier(a.reshape(-1, a.shape[-1]).T)


scan_separate.defvjp(_separate_forward, _separate_backward)


# ---- joined: both directions, one product --------------------------------------------------------------------------------------


def _joined_weights(w):
    """(D, 4, I, H) -> (D, I, 4H)."""
    return jnp.moveaxis(w, 1, 2).reshape(w.shape[0], w.shape[2], -1)


def _scan_joined(x, wx, wh, b, ended):
    split = lambda a: jnp.split(a, 4, axis=-1)
    # One product per direction: with a single one a TPU would change the layout of every time step's slice (docs/tpu.md).
    projected = [_product("tbi,ik->tbk", x[:, d], w) + b[d].reshape(1, 1, -1) for d, w in enumerate(_joined_weights(wx))]
    if ended is not None:
        projected = [jnp.concatenate(_close_gates(split(p), ended[:, d]), -1) for d, p in enumerate(projected)]
    projected = jnp.stack(projected, 1)
    recurrent = _joined_weights(wh).astype(x.dtype)
    step = lambda carry, p: _cell(split(p + _product("dbh,dhk->dbk", carry[1], recurrent)), carry, x.dtype)
    zero = jnp.zeros((*x.shape[1:3], wh.shape[-1]), x.dtype)
    return jax.lax.scan(step, (zero.astype(_sum_type(x)), zero), projected)[1]


@jax.custom_vjp
def scan_joined(x: jax.Array, wx: jax.Array, wh: jax.Array, b: jax.Array, ended: jax.Array | None = None) -> jax.Array:
    """LSTMs side by side: x (T, D, B, I), Wx (D, 4, I, H), Wh (D, 4, H, H), b (D, 4, H), ended (T, D, B, 1) bool -> h (T, D, B, H).

    Each of the D directions starts from a zero state at time step 0; the input of the backward one is flipped in time.
    """
    return _scan_joined(x, wx, wh, b, ended)[0]


def _joined_forward(x, wx, wh, b, ended):
    h, *saved = _scan_joined(x, wx, wh, b, ended)
    return h, (x, wx, wh, h, saved)


def _joined_backward(residual, dy):
    x, wx, wh, h, saved = residual
    to_previous_h = functools.partial(_product, "dbk,dhk->dbh", b=_joined_weights(wh).astype(dy.dtype))
    d = _gate_gradients(_derivatives(*saved), dy, to_previous_h, derivatives_of=lambda *given: given, reverse=True)
    split = lambda w: jnp.moveaxis(w.reshape(*w.shape[:-1], 4, wh.shape[-1]), 2, 1).astype(wh.dtype)  # (D, I, 4H) -> (D, 4, I, H)
    dwx = split(_product("tdbi,tdbk->dik", x, d))
    dwh = split(_product("tdbh,tdbk->dhk", _previous(h, False), d))
    dx = _product("tdbk,dik->tdbi", d, _joined_weights(wx)).astype(x.dtype)
    return dx, dwx, dwh, d.sum((0, 2), dtype=_sum_type(x)).reshape(wh.shape[0], 4, -1), None


scan_joined.defvjp(_joined_forward, _joined_backward)


# ---- cudnn: NVIDIA's kernel ----------------------------------------------------------------------------------------------------


def run_cudnn(x: jax.Array, lengths: jax.Array | None, forward: Weights, backward: Weights) -> jax.Array:
    """x (B, T, I) float32, lengths (B,) or None, weights of both directions -> (B, T, 2H).

    Products are in TF32 unless jax.default_matmul_precision is 'highest', as all products on such a GPU.
    """
    from jax.experimental import rnn

    if x.dtype != jnp.float32:
        raise ValueError(
            f"lstm 'cudnn': found inputs of {x.dtype}, expected float32, the only type it supports; or use lstm 'joined'"
        )
    clips, steps, inputs = x.shape
    units = forward[1].shape[-1]
    lengths = jnp.full((clips,), steps) if lengths is None else lengths
    zero = jnp.zeros((2, clips, units), x.dtype)
    # cuDNN rejects clips of length 0; their one time step of padding is set to 0 with all other padding below.
    result = rnn.lstm(x, zero, zero, flat_weights(forward, backward), jnp.maximum(lengths, 1).astype(jnp.int32),
                      inputs, units, 1, 0.0, True)  # fmt: skip
    return jnp.where((jnp.arange(steps)[None] < lengths[:, None])[..., None], result[0], 0.0)


def flat_weights(*directions: Weights) -> jax.Array:
    """The weights as cuDNN's one vector: the kernels (4H, I) and (4H, H) of each direction, then the two biases of each direction.

    Our cells have one bias per gate, that of the recurrent product; cuDNN's second bias, that of the input, is 0.
    """
    kernels = [jnp.swapaxes(w, 1, 2).ravel() for wx, wh, _ in directions for w in (wx, wh)]
    biases = [a.ravel() for _, _, b in directions for a in (jnp.zeros_like(b), b)]
    return jnp.concatenate(kernels + biases)
