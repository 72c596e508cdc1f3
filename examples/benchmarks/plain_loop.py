"""TD3+BC and IQL the way single-file implementations write them: the yardstick of ``control.py``.

Separate ``nn.Sequential`` networks, ``torch.optim.Adam``, one gather per field, a host read per logged scalar left out.
It is deliberately ordinary; nothing of the library is used.
"""

from __future__ import annotations

import copy
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def mlp(in_dim: int, out_dim: int, width: int = 256) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out_dim)
    )


def soft_update(target: nn.Module, source: nn.Module, tau: float = 0.005) -> None:
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.data.copy_((1 - tau) * t.data + tau * s.data)


class TD3BC:
    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.actor = nn.Sequential(mlp(obs_dim, action_dim), nn.Tanh())
        self.q1, self.q2 = mlp(obs_dim + action_dim, 1), mlp(obs_dim + action_dim, 1)
        self.targets = [copy.deepcopy(n) for n in (self.actor, self.q1, self.q2)]
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), 3e-4)
        self.critic_optimizer = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], 3e-4)

    def update(self, batch: Batch, step: int) -> None:
        obs, action, reward, next_obs, terminated = batch
        actor, q1, q2 = self.targets
        with torch.no_grad():
            noise = (torch.randn_like(action) * 0.2).clamp(-0.5, 0.5)
            next_action = (actor(next_obs) + noise).clamp(-1, 1)
            next_input = torch.cat([next_obs, next_action], 1)
            target_q = reward + 0.99 * (1 - terminated) * torch.min(q1(next_input), q2(next_input))
        inputs = torch.cat([obs, action], 1)
        loss = F.mse_loss(self.q1(inputs), target_q) + F.mse_loss(self.q2(inputs), target_q)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        if step % 2 == 0:
            pi = self.actor(obs)
            q = self.q1(torch.cat([obs, pi], 1))
            loss = -2.5 / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, action)
            self.actor_optimizer.zero_grad()
            loss.backward()
            self.actor_optimizer.step()
            for target, source in zip(self.targets, (self.actor, self.q1, self.q2), strict=True):
                soft_update(target, source)


class IQL:
    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.actor = nn.Sequential(mlp(obs_dim, action_dim), nn.Tanh())
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        self.q1, self.q2 = mlp(obs_dim + action_dim, 1), mlp(obs_dim + action_dim, 1)
        self.t1, self.t2 = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.v = mlp(obs_dim, 1)
        self.v_optimizer = torch.optim.Adam(self.v.parameters(), 3e-4)
        self.q_optimizer = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], 3e-4)
        self.actor_optimizer = torch.optim.Adam([*self.actor.parameters(), self.log_std], 3e-4)

    def update(self, batch: Batch, step: int) -> None:
        obs, action, reward, next_obs, terminated = batch
        inputs = torch.cat([obs, action], 1)
        with torch.no_grad():
            next_v = self.v(next_obs)
            target = torch.min(self.t1(inputs), self.t2(inputs))
        advantage = target - self.v(obs)
        loss = (torch.abs(0.7 - (advantage < 0).float()) * advantage**2).mean()
        self.v_optimizer.zero_grad()
        loss.backward()
        self.v_optimizer.step()
        target_q = reward + 0.99 * (1 - terminated) * next_v
        loss = (F.mse_loss(self.q1(inputs), target_q) + F.mse_loss(self.q2(inputs), target_q)) / 2
        self.q_optimizer.zero_grad()
        loss.backward()
        self.q_optimizer.step()
        soft_update(self.t1, self.q1)
        soft_update(self.t2, self.q2)
        weight = torch.exp(3.0 * advantage.detach()).clamp(max=100.0)
        policy = torch.distributions.Normal(self.actor(obs), self.log_std.clamp(-20, 2).exp())
        loss = -(weight * policy.log_prob(action).sum(-1, keepdim=True)).mean()
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()


def marks(
    method: str, columns: dict[str, Tensor], updates: int, batch_size: int = 256
) -> list[tuple[int, float, float]]:
    """(Updates made, seconds, seconds of the processor) every 64 updates after a tenth of warm-up.

    ``columns``: obs, action, reward, next_obs, terminated (float).
    """
    obs, action = columns["obs"], columns["action"]
    learner = {"TD3BC": TD3BC, "IQL": IQL}[method](obs.shape[1], action.shape[1])
    found = []
    for step in range(1, updates + updates // 10 + 1):
        if step > updates // 10 and (step - updates // 10) % 64 == 1:
            found.append((step, time.perf_counter(), time.process_time()))
        index = torch.randint(len(obs), (batch_size,))
        batch = tuple(columns[k][index] for k in ("obs", "action", "reward", "next_obs", "terminated"))
        learner.update(batch, step)  # type: ignore[arg-type]
    return [*found, (step + 1, time.perf_counter(), time.process_time())]
