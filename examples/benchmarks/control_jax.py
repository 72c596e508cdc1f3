"""TD3+BC and IQL as one compiled JAX scan over blocks of 64 updates, on CPU: a yardstick of control.py.

usage: python control_jax.py METHOD THREADS UPDATES ROWS

Needs jax and numpy only. The same sizes, losses, optimiser and targets as the library's; batches are drawn from the
data inside the scan. Prints one JSON object.
"""

import json
import os
import resource
import sys
import time
from itertools import pairwise

METHOD, THREADS, UPDATES, ROWS = sys.argv[1], *map(int, sys.argv[2:5])
os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={'true' if THREADS > 1 else 'false'}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

B, O, A, HIDDEN, K = 256, 17, 6, (256, 256), 64  # noqa: E741
DISCOUNT, TAU, LR = 0.99, 0.005, 3e-4


def start(key, inputs, outputs, stack=()):
    layers = []
    for n, m in pairwise((inputs, *HIDDEN, outputs)):
        key, weight, bias = jax.random.split(key, 3)
        limits = {"minval": -(n**-0.5), "maxval": n**-0.5}
        w, b = jax.random.uniform(weight, (*stack, n, m), **limits), jax.random.uniform(bias, (*stack, m), **limits)
        layers.append({"w": w, "b": b})
    return layers


def mlp(layers, x):
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def actor(p, s):
    return jnp.tanh(mlp(p, s))


def critics(p, s, a):
    return jax.vmap(mlp, (0, None))(p, jnp.concatenate([s, a], -1))[..., 0]


def value(p, s):
    return mlp(p, s)[..., 0]


def adam(p, moments, gradient, step):
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradient)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, moments[1], gradient)
    rate = LR * jnp.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return jax.tree.map(lambda x, m, v: x - rate * m / (jnp.sqrt(v) + 1e-8), p, first, second), (first, second)


def track(target, source):
    return jax.tree.map(lambda old, new: (1 - TAU) * old + TAU * new, target, source)


def td3bc(p, moments, target, batch, noise, step):
    """Two critic updates on batches of their own, then one of the actor and the targets: a scan steps by two."""

    def critic_loss(critic, b, noise):
        s, a, r, next_s, end = b
        next_a = jnp.clip(actor(target["actor"], next_s) + jnp.clip(0.2 * noise, -0.5, 0.5), -1, 1)
        goal = r + DISCOUNT * (1 - end) * critics(target["critic"], next_s, next_a).min(0)
        return ((critics(critic, s, a) - jax.lax.stop_gradient(goal)) ** 2).mean(-1).sum()

    def actor_loss(policy, s, a):
        pi = actor(policy, s)
        q = critics(jax.tree.map(lambda x: x[:1], p["critic"]), s, pi)[0]
        return ((pi - a) ** 2).mean() - 2.5 / jax.lax.stop_gradient(jnp.abs(q).mean()) * q.mean()

    losses = []
    for i in (0, 1):
        b = [field[i] for field in batch]
        loss, gradient = jax.value_and_grad(critic_loss)(p["critic"], b, noise[i])
        critic, found = adam(p["critic"], moments["critic"], gradient, 2 * step + i + 1)
        p, moments = p | {"critic": critic}, moments | {"critic": found}
        losses.append(loss)
    gradient = jax.grad(actor_loss)(p["actor"], b[0], b[1])
    policy, found = adam(p["actor"], moments["actor"], gradient, step + 1)
    p, moments = p | {"actor": policy}, moments | {"actor": found}
    return p, moments, track(target, p), losses


def iql(p, moments, target, batch, _, step):
    """Two whole updates."""
    losses = []
    for i in (0, 1):
        s, a, r, next_s, end = (field[i] for field in batch)
        next_v = value(p["value"], next_s)
        q = critics(target["critic"], s, a).min(0)
        advantage = q - value(p["value"], s)

        def value_loss(v, s=s, q=q):
            u = q - value(v, s)
            return (jnp.where(u < 0, 0.3, 0.7) * u**2).mean()

        def critic_loss(critic, s=s, a=a, goal=r + DISCOUNT * (1 - end) * next_v):
            return 0.5 * ((critics(critic, s, a) - goal) ** 2).mean(-1).sum()

        weight = jnp.minimum(jnp.exp(3.0 * advantage), 100.0)

        def actor_loss(policy, s=s, a=a, weight=weight):
            log_std = jnp.clip(policy["log_std"], -20, 2)
            z = (a - actor(policy["net"], s)) * jnp.exp(-log_std)
            return (weight * (0.5 * z**2 + log_std + 0.5 * jnp.log(2 * jnp.pi)).sum(-1)).mean()

        for name, loss in (("value", value_loss), ("critic", critic_loss), ("actor", actor_loss)):
            found, gradient = jax.value_and_grad(loss)(p[name])
            new, kept = adam(p[name], moments[name], gradient, 2 * step + i + 1)
            p, moments = p | {name: new}, moments | {name: kept}
            losses.append(found)
        target = track(target, {"critic": p["critic"]})
    return p, moments, target, losses


@jax.jit
def block(state, data):
    def two(state, step):
        p, moments, target, key = state
        key, rows, noise = jax.random.split(key, 3)
        index = jax.random.randint(rows, (2, B), 0, ROWS)
        batch = [column[index] for column in data]
        p, moments, target, losses = UPDATE(p, moments, target, batch, jax.random.normal(noise, (2, B, A)), step)
        return (p, moments, target, key), jnp.stack(losses).mean()

    first, state = state
    state, losses = jax.lax.scan(two, state, first + jnp.arange(K // 2))
    return (first + K // 2, state), losses.mean()


UPDATE = {"TD3BC": td3bc, "IQL": iql}[METHOD]


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    p = {"critic": start(keys[0], O + A, 1, (2,)), "actor": start(keys[1], O, A)}
    target = dict(p) if METHOD == "TD3BC" else {"critic": p["critic"]}
    if METHOD == "IQL":
        p |= {"actor": {"net": p["actor"], "log_std": jnp.zeros(A)}, "value": start(keys[2], O, 1)}
    moments = {name: (jax.tree.map(jnp.zeros_like, x), jax.tree.map(jnp.zeros_like, x)) for name, x in p.items()}
    rng = np.random.default_rng(0)
    data = [
        jnp.asarray(rng.standard_normal((ROWS, O), dtype=np.float32)),
        jnp.asarray(rng.uniform(-1, 1, (ROWS, A)).astype(np.float32)),
        jnp.asarray(rng.standard_normal(ROWS, dtype=np.float32)),
        jnp.asarray(rng.standard_normal((ROWS, O), dtype=np.float32)),
        jnp.zeros(ROWS),
    ]
    state, marks = (jnp.zeros((), jnp.int32), (p, moments, target, keys[3])), []
    for t in range(0, max(2 * K, UPDATES + UPDATES // 10), K):
        if t >= UPDATES // 10 and t:
            marks.append((t, time.perf_counter(), time.process_time()))
        state, loss = jax.block_until_ready(block(state, data))
    marks.append((t + K, time.perf_counter(), time.process_time()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"marks": marks, "peak_mib": peak, "loss": float(loss), "jax": jax.__version__}))


main()
