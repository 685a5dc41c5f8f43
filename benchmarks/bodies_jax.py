"""The ten models of `benchmarks.bodies` as a jitted `jax.lax.scan`, where JAX can be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

STEPS = 256
Scanned = tuple[Callable[[Any, Any, Any], Any], Any, Any]


def _array(tensor: Any) -> Any:
    return jnp.asarray(tensor.detach().numpy())


def _gru(w: Any, h: Any, x: Any) -> Any:
    gates, kept = x @ w["weight_ih"].T + w["bias_ih"], h @ w["weight_hh"].T + w["bias_hh"]
    (r, z, n), (hr, hz, hn) = jnp.split(gates, 3, -1), jnp.split(kept, 3, -1)
    z = jax.nn.sigmoid(z + hz)
    return (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn) + z * h


def _pendulum(w: Any, y: Any, _: Any) -> Any:
    def slope(y: Any) -> Any:
        return jnp.stack([y[..., 1], -w["p"][0] * jnp.sin(y[..., 0]) - w["p"][1] * y[..., 1]], -1)

    h = 0.01
    a = slope(y)
    b = slope(y + h / 2 * a)
    c = slope(y + h / 2 * b)
    return y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c)), None


def _lotka_volterra(w: Any, state: Any, _: Any) -> Any:
    (x, y), p = state, w["p"]
    return (x + 0.01 * (p[0] * x - p[1] * x * y), y + 0.01 * (p[2] * x * y - p[3] * y)), None


def _kalman(w: Any, state: Any, y: Any) -> Any:
    mean, covariance, likelihood = state
    f, h = w["f"], w["h"]
    mean = f @ jnp.tanh(mean)
    slope = f * (1 - jnp.tanh(mean) ** 2)
    covariance = slope @ covariance @ slope.T + 0.01 * jnp.eye(4)
    spread = h @ covariance @ h.T + 0.1 * jnp.eye(2)
    gain = jnp.linalg.solve(spread, h @ covariance).T
    missed = y - h @ mean
    likelihood -= 0.5 * (jnp.linalg.slogdet(spread)[1] + missed @ jnp.linalg.solve(spread, missed))
    return (mean + gain @ missed, (jnp.eye(4) - gain @ h) @ covariance, likelihood), None


def _spiking(w: Any, state: Any, x: Any) -> Any:
    v, s = state
    v = 0.9 * v + x + s @ w["w"] - s
    soft = (v - 1) / (1 + 10 * jnp.abs(v - 1))
    s = jax.lax.stop_gradient((v > 1).astype(v.dtype) - soft) + soft
    return (v, s), s


def _masked(w: Any, h: Any, given: Any) -> Any:
    x, done = given
    return _gru(w, jnp.where(done, 0.0, h), x), None


def _dropped(w: Any, h: Any, given: Any) -> Any:
    x, key = given
    h = _gru(w, h, x)
    return jnp.where(jax.random.bernoulli(key, 0.9, h.shape), h / 0.9, 0.0), None


def _denoiser(w: Any, x: Any, t: Any) -> Any:
    inner = jax.nn.silu(x @ w["into.weight"].T + w["into.bias"] + w["time.weight"][t])
    return x - 0.05 * (inner @ w["out.weight"].T + w["out.bias"]), None


def _sinkhorn(w: Any, f: Any, _: Any) -> Any:
    g = -jax.nn.logsumexp((f[:, :, None] - w["cost"]) / 0.1, 1) * 0.1
    return -jax.nn.logsumexp((g[:, None, :] - w["cost"]) / 0.1, 2) * 0.1, None


def _stencil(w: Any, u: Any, _: Any) -> Any:
    return u + 0.1 * w["k"] * (jnp.roll(u, 1, -1) - 2 * u + jnp.roll(u, -1, -1)), None


def _circuit(signs: Any) -> Callable[[Any, Any, Any], Any]:
    def step(w: Any, state: Any, layer: Any) -> Any:
        batch = state.shape[0]
        for qubit in range(3):
            half = w["angles"][layer, qubit] / 2
            c, s = jnp.cos(half), jnp.sin(half)
            parts = state.reshape(batch, 2**qubit, 2, 4 // 2**qubit)
            zero, one = parts[:, :, 0], parts[:, :, 1]
            state = jnp.stack([c * zero - 1j * s * one, c * one - 1j * s * zero], 2).reshape(batch, 8)
        return state * signs, None

    return step


def _scanned(name: str, model: Any) -> Scanned:
    """The step, the first state, and what each step is given."""
    xs = [_array(x) for x in model.xs]
    if name == "a GRU with dropout":
        return _dropped, jnp.zeros_like(xs[0][0]), (xs[0], jax.random.split(jax.random.key(0), STEPS))
    if name == "a circuit of 3 qubits":
        return _circuit(_array(model.signs)), xs[0], jnp.arange(20)
    made: dict[str, Callable[[], Scanned]] = {
        "a pendulum, RK4": lambda: (_pendulum, xs[0], jnp.arange(STEPS)),
        "Lotka-Volterra in a dict": lambda: (_lotka_volterra, tuple(xs), jnp.arange(STEPS)),
        "an extended Kalman filter": lambda: (_kalman, (jnp.zeros(4), jnp.eye(4), jnp.zeros(())), xs[0]),
        "spiking neurons": lambda: (_spiking, (jnp.zeros_like(xs[0][0]),) * 2, xs[0]),
        "a GRU with done masks": lambda: (_masked, jnp.zeros_like(xs[0][0]), tuple(xs)),
        "a denoiser": lambda: (_denoiser, xs[0], jnp.arange(STEPS)[::-1]),
        "Sinkhorn": lambda: (_sinkhorn, xs[0], jnp.arange(STEPS)),
        "a stencil by roll": lambda: (_stencil, xs[0], jnp.arange(STEPS)),
    }
    return made[name]()


def _weights(model: nn.Module) -> dict[str, Any]:
    return {name.removeprefix("cell."): _array(one) for name, one in model.named_parameters()}


def _in_jax(name: str, model: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward, and one with its backward."""
    step, init, given = _scanned(name, model)
    weights = _weights(model)

    def run(weights: Any, init: Any, given: Any) -> Any:
        final, outputs = jax.lax.scan(lambda state, x: step(weights, state, x), init, given)
        return final if outputs is None else outputs

    def total(weights: Any, init: Any, given: Any) -> Any:
        return sum(jnp.abs(leaf).sum() for leaf in jax.tree_util.tree_leaves(run(weights, init, given)))

    forward, backward = jax.jit(run), jax.jit(jax.grad(total))
    return (
        lambda: jax.block_until_ready(forward(weights, init, given)),
        lambda: jax.block_until_ready(backward(weights, init, given)),
    )


IN_JAX = None if jax is None else _in_jax
