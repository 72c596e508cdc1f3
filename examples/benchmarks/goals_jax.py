"""HIQL and OTA as one compiled JAX function per update, on CPU: the yardstick of goals.py. Needs jax and numpy only.

usage: python goals_jax.py METHOD THREADS UPDATES

The same sizes, losses, optimiser and targets as the library's, on batches drawn beforehand. Prints one JSON object.
"""

import json
import os
import sys
import time
from itertools import pairwise

METHOD, THREADS, UPDATES = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={'true' if THREADS > 1 else 'false'}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

B, O, A, Z, HIDDEN = 1024, 29, 8, 10, (512, 512, 512)  # noqa: E741
DISCOUNT, TAU, EXPECTILE, ALPHA, LR = 0.99, 0.005, 0.7, 3.0, 3e-4


def start(key, widths, norm, stack=()):
    layers = []
    for i, (n, m) in enumerate(pairwise(widths)):
        key, own = jax.random.split(key)
        limit = (6 / (n + m)) ** 0.5
        layer = {"w": jax.random.uniform(own, (*stack, n, m), minval=-limit, maxval=limit), "b": jnp.zeros((*stack, m))}
        if norm and i < len(widths) - 2:
            layer |= {"scale": jnp.ones((*stack, m)), "shift": jnp.zeros((*stack, m))}
        layers.append(layer)
    return layers


def mlp(layers, x):
    for i, layer in enumerate(layers):
        x = x @ layer["w"] + layer["b"]
        if i < len(layers) - 1:
            x = jax.nn.gelu(x, approximate=True)
        if "scale" in layer:
            mean = x.mean(-1, keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["shift"]
    return x


def phi(p, s, g):
    z = mlp(p["phi"], jnp.concatenate([s, g], -1))
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True) * Z**0.5


def value(heads, p, s, g):
    x = jnp.concatenate([s, phi(p, s, g)], -1)
    return jax.vmap(mlp, (0, None))(heads, x)[..., 0]


def value_loss(p, target, frozen, name, s, next_s, g, reward, mask):
    now, then = (value(target[name], frozen, x, g) for x in (s, next_s))
    advantage = reward + DISCOUNT * mask * then.min(0) - now.mean(0)
    weight = jnp.where(advantage >= 0, EXPECTILE, 1 - EXPECTILE)
    return (weight * (reward + DISCOUNT * mask * then - value(p[name], p, s, g)) ** 2).mean(1).sum()


def cloning_loss(mean, x, advantage):
    weight = jnp.minimum(jnp.exp(ALPHA * advantage), 100.0)
    return (weight * 0.5 * ((x - mean) ** 2).sum(-1)).mean()


def total_loss(p, target, b):
    frozen = jax.lax.stop_gradient(p)

    def progress(name, s, later, g):
        return (value(frozen[name], frozen, later, g) - value(frozen[name], frozen, s, g)).mean(0)

    s = b["s"]
    loss = value_loss(p, target, frozen, "value", s, b["next_s"], b["g"], b["r"], b["m"])
    if METHOD == "OTA":
        loss += value_loss(p, target, frozen, "high", s, b["option"], b["option_g"], b["option_r"], b["option_m"])
    z = phi(frozen, s, b["low_g"])
    mean = mlp(p["low_actor"], jnp.concatenate([s, z], -1))
    loss += cloning_loss(mean, b["a"], progress("value", s, b["next_s"], b["low_g"]))
    mean = mlp(p["high_actor"], jnp.concatenate([s, b["high_g"]], -1))
    high = progress("high" if METHOD == "OTA" else "value", s, b["w"], b["high_g"])
    return loss + cloning_loss(mean, phi(frozen, s, b["w"]), high)


@jax.jit
def update(p, target, first, second, step, b):
    grads = jax.grad(total_loss)(p, target, b)
    target = jax.tree.map(lambda old, new: (1 - TAU) * old + TAU * new, target, {name: p[name] for name in target})
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
    rate = LR * jnp.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    p = jax.tree.map(lambda x, m, v: x - rate * m / (jnp.sqrt(v) + 1e-8), p, first, second)
    return p, target, first, second, step + 1


def main():
    keys = jax.random.split(jax.random.key(0), 5)
    p = {
        "phi": start(keys[0], (2 * O, *HIDDEN, Z), True),
        "value": start(keys[1], (O + Z, *HIDDEN, 1), True, (2,)),
        "low_actor": start(keys[2], (O + Z, *HIDDEN, A), False),
        "high_actor": start(keys[3], (2 * O, *HIDDEN, Z), False),
    }
    p |= {"high": start(keys[4], (O + Z, *HIDDEN, 1), True, (2,))} if METHOD == "OTA" else {}
    target = {name: p[name] for name in ("value", "high") if name in p}
    state = (p, target, jax.tree.map(jnp.zeros_like, p), jax.tree.map(jnp.zeros_like, p), jnp.ones(()))
    rng = np.random.default_rng(0)

    def batch():
        states = ("s", "next_s", "g", "low_g", "high_g", "w", "option", "option_g")
        b = {name: rng.standard_normal((B, O), dtype=np.float32) for name in states}
        mask = (rng.random(B) > 0.2).astype(np.float32)
        b |= {"a": rng.random((B, A), dtype=np.float32), "m": mask, "r": -mask}
        return b | {"option_m": mask, "option_r": -mask}

    batches = [batch() for _ in range(4)]
    state = jax.block_until_ready(update(*state, batches[0]))
    times = []
    for i in range(UPDATES):
        began = time.perf_counter()
        state = jax.block_until_ready(update(*state, batches[i % 4]))
        times.append(time.perf_counter() - began)
    times.sort()
    best = times[: (len(times) + 1) // 2]
    print(json.dumps({"updates_per_s": len(best) / sum(best), "jax": jax.__version__}))


main()
