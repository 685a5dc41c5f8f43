"""The loops of `benchmarks.outputs` as a jitted `jax.lax.scan` that stacks the same, where JAX can be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.recurrences import gru, lstm

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None


def _gru(w: Any, states: Any, x: Any) -> Any:
    h = gru(w, states[0], x)
    return (h,), (h,)


def _lstm(w: Any, states: Any, x: Any) -> Any:
    new = lstm(w, states, x)
    return new, (new[0],)


def _biquad(w: Any, states: Any, x: Any) -> Any:
    y = w["b"][0] * x + states[0]
    return (w["b"][1] * x + w["a"][0] * y + states[1], w["b"][2] * x + w["a"][1] * y), (y,)


def _spiking(w: Any, states: Any, x: Any) -> Any:
    v = 0.9 * states[0] + x @ w["weight"].T + w["bias"]
    soft = jax.nn.sigmoid(4 * (v - 1))
    fired = jax.lax.stop_gradient((v > 1).astype(v.dtype) - soft) + soft
    return (v - fired,), (fired,)


def _bucket(w: Any, states: Any, x: Any) -> Any:
    (store,) = states
    evaporated = w["rates"][0] * jax.nn.sigmoid(store)
    flow, leak = w["rates"][1] * jax.nn.relu(store - 0.5), w["rates"][2] * jnp.abs(store)
    return (store + 0.1 * x - evaporated - flow - leak,), (evaporated, flow, leak)


STEPS = {"Gru": _gru, "Lstm": _lstm, "Biquad": _biquad, "Spiking": _spiking, "Bucket": _bucket}


def in_jax(name: str, loop: nn.Module, count: int, xs: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward that stacks everything, `[B, T, ...]`, and one with its gradients with respect to the parameters.

    Args:
        name: of the loop.
        count: how many states it has.
        xs: `[T, B, ...]`.
    """
    step = STEPS[name]
    weights = {path.split(".")[-1]: jnp.asarray(one.detach().numpy()) for path, one in loop.named_parameters()}
    given = jnp.asarray(xs.numpy())

    def everything(weights: Any, given: Any) -> Any:
        states = tuple(jnp.zeros_like(given[0]) for _ in range(count))
        _, outputs = jax.lax.scan(lambda states, x: step(weights, states, x), states, given)
        return [jnp.moveaxis(one, 0, 1) for one in outputs]

    def loss(weights: Any, given: Any) -> Any:
        outputs = everything(weights, given)
        return sum(one.sum() for one in outputs), outputs

    forward, train = jax.jit(everything), jax.jit(jax.value_and_grad(loss, has_aux=True))
    return (
        lambda: jax.block_until_ready(forward(weights, given)),
        lambda: jax.block_until_ready(train(weights, given)),
    )
