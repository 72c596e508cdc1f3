"""The sampler on laws whose score is known, its schedules, guidance, and generated trajectories as a replay."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offpolicy.diffusion.sampler import (
    GuidanceOptions,
    SamplerOptions,
    guidance_schedule,
    noise_levels,
    policy_score,
    sample,
    to_replay,
    unit_length,
)
from offpolicy.diffusion.trajectories import Channels
from offpolicy.errors import DataError, UsageError
from offpolicy.nn.policies import normal_log_prob

Function = Callable[[Tensor, Tensor], Tensor]


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise_of(shape: tuple[int, ...], seed: int = 0) -> Callable[[int], Tensor]:
    """Standard normal numbers of a step, the same whenever they are asked for."""

    def noise(i: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + i + 1)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return noise


class Normal:
    """Trajectories of one step with a normal law, its denoiser μ + Σ(Σ + σ²)⁻¹(x - μ), and the exact map of the ODE."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        basis, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        self.values, self.basis = t(0.3, 0.8, 1.5), basis
        self.mean = t(0.5, -1.0, 0.2)
        self.calls = 0

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return x @ (self.basis * factor) @ self.basis.T

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.mean + self.times(x - self.mean, self.values / (self.values + sigma**2))

    def exact(self, start: Tensor, sigma: float) -> Tensor:
        return self.mean + self.times(start - self.mean, (self.values / (self.values + sigma**2)).sqrt())


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_noise_levels_known_answers() -> None:
    expected = t(80, 34.9921890, 13.6985747, 4.63707497, 1.28661427, 0.267475361, 0.0351866510, 0.002, 0)
    torch.testing.assert_close(noise_levels(SamplerOptions(steps=8)), expected, rtol=1e-8, atol=0)
    many = noise_levels(SamplerOptions())
    torch.testing.assert_close(many[[1, 127]], t(78.3028508, 2.55968938), rtol=1e-8, atol=0)
    assert many.shape == (257,) and many.dtype == torch.float64


def test_guidance_schedule_known_answers() -> None:
    """κ = 1, cosine 0.3, N = 8: 1 + 0.3·sin(π/8) first, 5/8 + 0.3 at i = 3, 0 last; before the delay 0 too."""
    found = guidance_schedule(8, GuidanceOptions(coefficient=1.0))
    torch.testing.assert_close(found[[0, 3, 7]], t(1.1148050, 0.925, 0.0), rtol=1e-7, atol=0)
    torch.testing.assert_close(guidance_schedule(8, GuidanceOptions(coefficient=2.0)), 2 * found)
    delayed = guidance_schedule(8, GuidanceOptions(coefficient=1.0, delay=3))
    assert torch.equal(delayed[:3], torch.zeros(3).double()) and torch.equal(delayed[3:], found[3:])


# -- the sampler on a normal law ---------------------------------------------------------------------------------------


def error_of(steps: int, order: int = 2) -> float:
    law, shape = Normal(), (2000, 1, 3)
    options = SamplerOptions(steps=steps, churn=0.0, order=order)
    found = sample(law.denoise, shape, options, noise=noise_of(shape))
    assert law.calls == (2 * steps - 1 if order == 2 else steps)
    return (found - law.exact(80.0 * noise_of(shape)(-1), 80.0)).abs().max().item()


def test_heun_is_of_second_order() -> None:
    """The error of the deterministic sampler falls to a quarter per doubling of the steps, towards the exact map."""
    errors = [error_of(n) for n in (16, 32, 64, 256)]
    assert errors[0] < 0.5 and errors[1] < 0.1 and errors[2] < 0.03 and errors[3] < 2e-3
    assert errors[0] / errors[1] > 3 and 3.2 < errors[1] / errors[2] < 5


def test_euler_is_of_first_order() -> None:
    coarse, fine = error_of(64, 1), error_of(128, 1)
    assert 1.6 < coarse / fine < 2.4 and fine > 3 * error_of(128)


def covariance_ratio(**options: Any) -> float:
    """Mean variance of samples along the law's axes, divided by the law's."""
    law, shape = Normal(), (8000, 1, 3)
    found = sample(law.denoise, shape, SamplerOptions(**options), noise=noise_of(shape))
    along = (found[:, 0] - law.mean) @ law.basis
    return (along.var(0) / law.values).mean().item()


def test_churn_keeps_the_law_and_the_reference_predictor_widens_it() -> None:
    assert covariance_ratio(steps=64) == pytest.approx(1.05, abs=0.04)
    assert covariance_ratio(steps=64, reference_predictor=True) == pytest.approx(1.28, abs=0.06)


def test_in_first_order_churn_narrows_the_law() -> None:
    assert covariance_ratio(steps=256, order=1) == pytest.approx(0.87, abs=0.03)


def test_without_churn_the_two_predictors_agree() -> None:
    law, shape = Normal(), (50, 1, 3)
    one, two = (
        sample(law.denoise, shape, SamplerOptions(steps=16, churn=0.0, reference_predictor=r), noise=noise_of(shape))
        for r in (False, True)
    )
    assert torch.equal(one, two)


def test_one_step_by_hand() -> None:
    """N = 2, levels 4, 1, 0, churn 0, D = 0, so d = x/σ. Heun: x = 4ε → x' = ε, d' = ε, x = 4ε - ½·3·(ε + ε) = ε; then
    ε - 1·ε = 0."""
    shape = (1, 1, 1)
    options = SamplerOptions(steps=2, sigma_min=1.0, sigma_max=4.0, churn=0.0)
    seen: list[tuple[float, float]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x.item(), sigma.item()))
        return torch.zeros_like(x)

    found = sample(denoise, shape, options, noise=lambda i: torch.full(shape, 0.5, dtype=torch.float64))
    assert found.item() == pytest.approx(0.0)
    assert np.array(seen) == pytest.approx(np.array([(2.0, 4.0), (0.5, 1.0), (0.5, 1.0)]))


def test_new_noise_by_hand() -> None:
    """Churn 0.2·2 of N = 2 at σ = 4 only: σ̂ = 4.8, x̂ = 4ε + √(4.8² - 16)·2·ε₀, then Euler to 1 with D = 0: x̂/4.8."""
    shape, options = (1, 1, 1), {"steps": 2, "sigma_min": 1.0, "sigma_max": 4.0, "churn": 0.4, "churn_min": 2.0}
    values = {-1: 0.5, 0: 0.25, 1: 9.0}
    seen: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x.item())
        return torch.zeros_like(x)

    sample(
        denoise,
        shape,
        SamplerOptions(**options, noise_scale=2.0, order=1),
        noise=lambda i: torch.full(shape, values[i], dtype=torch.float64),
    )
    noised = 2.0 + math.sqrt(4.8**2 - 16) * 2 * 0.25
    assert seen == pytest.approx([noised, noised / 4.8])


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_guidance_comes_before_the_new_noise() -> None:
    """As above with λ₀ = 0.5·(1 - 0 + 0.3·sin(π/2)) = 0.65 of a gradient 1, taken at D(x; 4): x̂ = 4ε + 0.65 + …"""
    shape, options = (1, 1, 1), {"steps": 2, "sigma_min": 1.0, "sigma_max": 4.0, "churn": 0.4, "churn_min": 2.0}
    seen: list[tuple[float, float]] = []
    at: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x.item(), sigma.item()))
        return torch.zeros_like(x)

    def score(y: Tensor) -> Tensor:
        at.append(y.item())
        return torch.full_like(y, 7.0)  # of length 1 once normalised

    sample(
        denoise,
        shape,
        SamplerOptions(**options, noise_scale=2.0, order=1),
        score=score,
        guidance=GuidanceOptions(coefficient=0.5),
        noise=lambda i: torch.full(shape, {-1: 0.5, 0: 0.25, 1: 9.0}[i], dtype=torch.float64),
    )
    noised = 2.65 + math.sqrt(4.8**2 - 16) * 2 * 0.25
    assert np.array(seen) == pytest.approx(np.array([(2.0, 4.0), (noised, 4.8), (noised / 4.8, 1.0)]))
    assert at == [0.0]


def stepped() -> tuple[Function, list[int]]:
    """A denoiser towards 0 that counts its calls."""
    calls = [0]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        calls[0] += 1
        return x / (1 + sigma**2)

    return denoise, calls


def test_no_guidance_bit_for_bit() -> None:
    shape, options = (5, 4, 3), SamplerOptions(steps=12)
    asked: dict[str, list[int]] = {"with": [], "without": []}

    def noise(where: str) -> Callable[[int], Tensor]:
        def drawn(i: int) -> Tensor:
            asked[where].append(i)
            return noise_of(shape)(i)

        return drawn

    denoise, _ = stepped()
    plain = sample(denoise, shape, options, noise=noise("without"))
    guided = sample(denoise, shape, options, score=lambda y: y / 0.0, guidance=GuidanceOptions(), noise=noise("with"))
    assert torch.equal(plain, guided) and asked["with"] == asked["without"] == list(range(-1, 12))


@pytest.mark.parametrize(("denoised", "calls"), [(True, 15 + 7 - 2), (False, 15)])
def test_what_guidance_costs_and_where_its_gradient_is_taken(denoised: bool, calls: int) -> None:
    """2N - 1 = 15 calls; one more for each of the 7 steps with λ > 0, of which a delay of 2 takes two away."""
    shape = (2, 3, 2)
    denoise, count = stepped()
    at: list[Tensor] = []

    def score(y: Tensor) -> Tensor:
        at.append(y.clone())
        return torch.zeros_like(y)

    guidance = GuidanceOptions(coefficient=1.0, delay=2, denoised=denoised)
    sample(denoise, shape, SamplerOptions(steps=8), score=score, guidance=guidance, noise=noise_of(shape))
    assert count[0] == calls and len(at) == 5
    assert (at[0].abs().max() < 5) == denoised  # the state itself is as wide as σ₂ = 13.7


def test_a_trajectory_is_normalised_by_itself() -> None:
    """3-4-5: the norm runs over steps and channels of one trajectory, and 0 stays finite."""
    gradient = torch.zeros(3, 2, 2, dtype=torch.float64)
    gradient[0, 0, 1], gradient[0, 1, 1] = 3.0, 4.0
    gradient[1] = 1e3
    found = unit_length(gradient)
    torch.testing.assert_close(found[0, :, 1], t(0.6, 0.8), rtol=1e-8, atol=0)
    torch.testing.assert_close(found[1], torch.full((2, 2), 0.5).double())
    assert torch.equal(found[2], torch.zeros(2, 2).double())


class ConstantPolicy:
    """N(m, s²) of every action dimension, whatever the observation."""

    def __init__(self, mean: Tensor, std: float) -> None:
        self.mean, self.std = mean, torch.as_tensor(std, dtype=torch.float64)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        self.obs = obs
        return normal_log_prob(action, self.mean + 0.0 * obs.sum(-1, keepdim=True), self.std.log())


def channels_of(obs_dim: int, action_dim: int) -> Channels:
    channels = Channels(obs_dim, action_dim).double()
    generator = torch.Generator().manual_seed(5)
    channels.mean.copy_(torch.randn(channels.count, generator=generator))
    channels.std.copy_(0.5 + torch.rand(channels.count, generator=generator))
    channels.spread.copy_(channels.std)
    return channels


def test_the_policy_score_in_closed_form() -> None:
    """-(a - μ)/s²·(1 - a²)·std, at a = tanh(y·std + mean), 0 elsewhere; the policy sees observations in raw units."""
    channels, policy = channels_of(2, 2), ConstantPolicy(t(0.3, -0.6), 0.7)
    y = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = policy_score(channels, policy)(y)  # type: ignore[arg-type]
    std = channels.std[2:4]
    action = torch.tanh(y[..., 2:4] * std + channels.mean[2:4])
    torch.testing.assert_close(found[..., 2:4], -(action - policy.mean) / 0.49 * (1 - action**2) * std)
    assert not found[..., [0, 1, 4, 5]].any()
    torch.testing.assert_close(policy.obs, y[..., :2] * channels.std[:2] + channels.mean[:2])
    assert not policy.obs.requires_grad


def test_a_constant_action_takes_no_guidance() -> None:
    channels = channels_of(1, 1)
    channels.spread[1] = 0.0
    y = torch.randn(2, 3, 4, dtype=torch.float64)
    assert not policy_score(channels, ConstantPolicy(t(0.3), 1.0))(y).any()  # type: ignore[arg-type]


@pytest.mark.parametrize("normalize", [True, False])
def test_guidance_moves_actions_towards_the_policy_and_nothing_else(normalize: bool) -> None:
    """Independent N(0, 1) channels, policy N(0.6, 1): the mean of tanh of the actions rises with κ, monotonically."""
    shape, options = (1500, 2, 4), SamplerOptions(steps=24)
    channels = Channels(1, 1).double()
    score = policy_score(channels, ConstantPolicy(t(0.6), 1.0))  # type: ignore[arg-type]
    denoise, _ = stepped()
    means, others = [], []
    for coefficient in (0.0, 0.05, 0.1, 0.2):
        guidance = GuidanceOptions(coefficient=coefficient, normalize=normalize)
        x = sample(denoise, shape, options, score=score, guidance=guidance, noise=noise_of(shape))
        means.append(torch.tanh(x[..., 1]).mean().item())
        others.append(x[..., [0, 2, 3]])
    gains = np.diff(means)
    assert (gains > 0.005).all() and means[-1] < 0.65, means
    torch.testing.assert_close(others[-1], others[0], rtol=1e-10, atol=1e-10)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "`sampler.steps` is 1"),
        ({"sigma_min": 0.0}, "`sampler.sigma_min` is 0"),
        ({"sigma_max": 0.001}, "`sampler.sigma_max` is 0.001"),
        ({"order": 3}, "`sampler.order` is 3"),
        ({"churn": -1.0}, "`sampler.churn` is -1"),
        ({"order": 1, "reference_predictor": True}, "samples collapse"),
    ],
)
def test_impossible_samplers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SamplerOptions(**options)
    SamplerOptions(order=1, reference_predictor=True, churn=0.0)


def test_impossible_guidance_and_noise() -> None:
    with pytest.raises(UsageError, match=r"`guidance\.coefficient` is -1"):
        GuidanceOptions(coefficient=-1.0)
    with pytest.raises(UsageError, match=r"`noise` gives the shape \(2, 3, 1\)"):
        sample(stepped()[0], (2, 3, 4), SamplerOptions(), noise=noise_of((2, 3, 1)))


# -- as a replay -------------------------------------------------------------------------------------------------------

META = {
    "name": "hopper",
    "env_id": "Hopper-v4",
    "action_low": [-2.0],
    "action_high": [4.0],
    "ref_min_score": 1.0,
    "ref_max_score": 2.0,
    "notes": ["of the real data"],
}


def generated(n: int = 3, horizon: int = 4) -> dict[str, Tensor]:
    obs = torch.arange(n * horizon * 2, dtype=torch.float32).reshape(n, horizon, 2)
    reward = torch.arange(n * horizon, dtype=torch.float32).reshape(n, horizon)
    action = torch.linspace(-1, 1, n * horizon).reshape(n, horizon, 1)
    return {"obs": obs, "action": action, "reward": reward, "terminated": torch.zeros(n, horizon, dtype=torch.bool)}


def test_steps_become_transitions() -> None:
    """4 steps: 3 transitions, the last step is a next observation. Ended at step 1: 2 transitions. Ended at the last
    step, which needs no next observation: 4."""
    made = generated()
    made["terminated"][1, 1:3] = True
    made["terminated"][2, 3] = True
    replay = to_replay(made, META)
    assert replay.length.tolist() == [3, 2, 4] and replay.all_usable
    assert replay.rows_with_successor().tolist() == list(range(8))  # what follows the last end was not generated
    assert replay.steps["reward"].tolist() == [0, 1, 2, 4, 5, 8, 9, 10, 11]
    assert np.flatnonzero(replay.steps["terminated"]).tolist() == [4, 8]
    after = replay.next_obs(np.arange(5))
    assert torch.equal(after, torch.cat([made["obs"][0, 1:4], made["obs"][1, 1:3]]))
    torch.testing.assert_close(replay.steps["action"][:3], 1 + 3 * made["action"][0, :3].numpy())  # bounds -2 and 4
    assert replay.meta["name"] == "hopper synthetic" and replay.meta["ref_max_score"] == 2.0
    assert replay.meta["env_id"] == "Hopper-v4" and "notes" not in replay.meta


def test_what_cannot_become_a_replay() -> None:
    made = generated()
    made["reward"][1, 2] = torch.nan
    with pytest.raises(DataError, match="1 of 3 generated trajectories have a `reward` that is not finite"):
        to_replay(made, META)
    with pytest.raises(DataError, match="no `action_low` and `action_high`"):
        to_replay(generated(), {"name": "x"})


def test_namespaces_do_for_policies() -> None:
    """Anything with ``log_prob`` guides."""
    policy: Any = SimpleNamespace(log_prob=lambda obs, action: action.sum(-1))
    assert policy_score(channels_of(1, 1), policy)(torch.zeros(1, 2, 4).double())[..., 1].all()
