"""What a method is outside of training: built from sizes, kept in a checkpoint, and asked for actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from offpolicy.data.normalize import Normalizer
from offpolicy.data.sizes import Sizes
from offpolicy.errors import UsageError
from offpolicy.nn.policies import GaussianPolicy, TanhGaussianPolicy, normal_log_prob
from offpolicy.training.checkpoints import write_checkpoint
from offpolicy.training.module import Module
from offpolicy.training.seeds import ask_each, build_stacked, method_of_seed


class ActingModule(Module):
    """Networks for the sizes of the data, the normaliser of observations and actions, and answers in their units.

    Training is not here: see :class:`offpolicy.training.offline.OfflineModule`, which methods inherit from.
    """

    seed_axis: ClassVar[bool] = True  # false where a layer or a loss has no room for several seeds
    sizes: Sizes = None  # type: ignore[assignment]  # set by `initialize`
    normalizer: Normalizer

    # -- to be written by a method -------------------------------------------------------------------------------------

    def build(self, sizes: Sizes) -> None:
        """Make the networks. Called once, before training or when a checkpoint is opened without data."""
        raise UsageError(f"{type(self).__name__} must define build(sizes) and make its networks there.")

    def policy(self, obs: Tensor) -> Tensor:
        """Deterministic action in [-1, 1] for normalised observations: (…, B, O) → (…, B, A)."""
        raise UsageError(f"{type(self).__name__} must define policy(obs), used by act() and evaluation.")

    def log_density(self, obs: Tensor, action: Tensor) -> Tensor:
        """log π(a|s), nats, (B,), of actions (B, A) in [-1, 1] for normalised observations (B, O).

        A normal of unit variance around :meth:`policy`, as Policy-Guided Diffusion (arXiv:2404.06356, authors' code)
        takes it for deterministic actors; a method with a stochastic actor gives that one's law.
        """
        return normal_log_prob(action, self.policy(obs).clamp(-1.0, 1.0), action.new_zeros(()).expand_as(action))

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Action drawn from the policy by standard normal noise (B, A), for normalised observations (B, O).

        Only a method with a stochastic actor defines it; its law is that of :meth:`log_density`.
        """
        raise UsageError(
            f"{type(self).__name__} is deterministic, so no actions can be drawn from it; expected a stochastic policy."
        )

    # -- construction --------------------------------------------------------------------------------------------------

    def initialize(self, sizes: Sizes, seed: int | None = None) -> Self:
        """Build the networks for these sizes, reproducibly from the seed, without data or trainer. Returns self."""
        if self.sizes is not None:
            if self.sizes != sizes:
                raise UsageError(f"the method was built for {self.sizes} but the data have {sizes}; expected the same.")
            return self
        self.sizes = sizes
        self.seed = seed if seed is not None else (self.seed if self.seed is not None else torch.initial_seed())
        self.seed %= 1 << 63
        self.normalizer = Normalizer((sizes.obs_dim,), sizes.action_dim)
        with torch.random.fork_rng(devices=[]):
            if not self.seeds:
                torch.manual_seed(self.seed)
                self.build(sizes)
            else:
                build_stacked(self, partial(self.build, sizes))
        return self

    def check_built(self) -> None:
        """Raise :class:`UsageError` unless there are networks."""
        if self.sizes is None:
            raise UsageError(
                f"{type(self).__name__} has no networks yet; expected a trained method. Fit it, load a checkpoint, or "
                "call `prepare(replay)`."
            )

    def check_one_seed(self) -> None:
        """Raise :class:`UsageError` where there are several seeds, each a policy of its own."""
        if self.seeds:
            raise UsageError(
                f"{type(self).__name__} holds the seeds {', '.join(map(str, self.seeds))}, each a policy of its own; "
                f"expected one. Pass the folder of one seed, or take one out: take_seed({self.seeds[0]})."
            )

    def take_seed(self, seed: int) -> Self:
        """A method of one seed alone, out of a method of several.

        Its weights are those of that seed, bit by bit, so it acts and is evaluated as that seed is; it can be saved by
        :meth:`save`. It does not share memory with this method, and its optimisers are new.

        Args:
            seed: one of ``seeds``, the number itself and not its place.

        Raises:
            UsageError: no such seed, or no networks yet.
        """
        self.check_built()
        if seed not in self.seeds:
            held = f"the seeds {', '.join(map(str, self.seeds))}" if self.seeds else f"one seed, {self.seed}, alone"
            raise UsageError(
                f"there is no seed {seed} to take: {type(self).__name__} holds {held}. Pass one of several."
            )
        return method_of_seed(self, seed)

    def save(self, path: str | Path) -> None:
        """Write the weights and settings into a file that :func:`offpolicy.load` opens, as ``policy.ckpt``.

        Training cannot go on from it, since it has no optimisers: a run writes checkpoints for that.

        Raises:
            UsageError: no networks yet.  WriteError: the file cannot be written.
        """
        self.check_built()
        checkpoint: dict[str, Any] = {"state_dict": self.state_dict(), "global_step": self.updates}
        self.on_save_checkpoint(checkpoint)
        write_checkpoint(checkpoint, path)

    def repr_facts(self) -> list[tuple[str, Any]]:
        widths = [] if self.sizes is None else [("observation", self.sizes.obs_dim), ("action", self.sizes.action_dim)]
        seeds = ", ".join(map(str, self.seeds))
        return [*widths, ("seeds", f"({seeds})" if seeds else ""), *super().repr_facts()]

    def network_state(self) -> dict[str, Any]:
        return {"sizes": asdict(self.sizes), "seeds": self.seeds}

    def restore_networks(self, state: Mapping[str, Any]) -> None:
        self.seeds = tuple(state["seeds"])
        self.initialize(Sizes(**state["sizes"]), seed=state["seed"])

    # -- acting --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Any) -> Any:
        """Deterministic action in environment units.

        Args:
            obs: raw observation(s), NumPy or tensor, shape (O,) or (n, O).

        Returns:
            Action(s) of the same kind, (A,) or (n, A). With S seeds what each of them does, (S, A) or (S, n, A).
        """
        x = self.normalized(obs)
        action = self.ask(lambda: self.normalizer.environment_action(self.policy(x).clamp(-1.0, 1.0)))
        action = action[..., 0, :] if np.ndim(obs) == 1 else action
        return action if isinstance(obs, Tensor) else action.float().cpu().numpy()

    def explore(self, obs: Tensor, noise: Tensor, scale: float) -> Tensor:
        """Action to collect data with, (…, B, A); the caller clamps it to [-1, 1].

        A stochastic actor is sampled; a deterministic policy gets normal noise.

        Args:
            obs: normalised observations (…, B, O).
            noise: standard normal (…, B, A).
            scale: standard deviation of the noise on a deterministic action, ≥ 0.
        """
        actor = getattr(self, "actor", None)
        if isinstance(actor, TanhGaussianPolicy):
            return actor.draw(obs, noise)
        if isinstance(actor, GaussianPolicy):
            return actor.sample(obs, noise)
        return self.policy(obs) + scale * noise

    def exploratory_action(self, obs: np.ndarray, noise: Tensor, scale: float) -> np.ndarray:
        """:meth:`explore` in environment units: observations (O,) or (n, O) and noise (A,) or (n, A) → float32 actions.

        The method is in evaluation mode, and no gradient is wanted.
        """
        x = self.normalized(obs)
        action = self.explore(x, noise.to(x).reshape(len(x), -1), scale).clamp(-1.0, 1.0)
        found = self.normalizer.environment_action(action).float().cpu().numpy()
        return found if np.ndim(obs) == 2 else found[0]

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer of the networks in evaluation mode; with seeds that of each, along a new first axis."""
        training = self.training
        self.eval()
        answer = ask_each(self, question) if self.seeds else question()
        self.train(training)
        return answer

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """log π(action | obs) under the policy as trained, summed over the dimensions of the action.

        Deterministic policies count as normals of unit variance around their action. Differentiable.

        Args:
            obs: raw observations (…, O).
            action: (…, A) in [-1, 1].

        Returns:
            Nats, (…,).

        Raises:
            UsageError: the method is no policy of one observation, or holds several seeds.
        """
        self.check_one_seed()
        x = self.normalized(obs.reshape(-1, obs.shape[-1]))
        training = self.training
        self.eval()
        found = self.log_density(x, action.to(x).reshape(len(x), -1))
        self.train(training)
        return found.reshape(obs.shape[:-1])

    def normalized(self, obs: Any, name: str = "obs") -> Tensor:
        """Raw observation(s), NumPy or tensor, (O,) or (n, O), as normalised ones (n, O) on the method's device."""
        self.check_built()
        x = torch.as_tensor(obs, device=self.device, dtype=self.dtype_of_weights)
        if x.shape[-1:] != (self.sizes.obs_dim,) or x.dim() not in (1, 2):
            raise UsageError(
                f"`{name}` has shape {tuple(x.shape)}; expected ({self.sizes.obs_dim},) or (n, {self.sizes.obs_dim})."
            )
        return self.normalizer.obs(x if x.dim() == 2 else x[None])

    def agent(self) -> Any:
        """What evaluation plays with: a function of observations (n, O), or an object that remembers.

        See :class:`offpolicy.evaluation.rollout.Agent`; ``act`` unless a method needs the history.
        """
        return self.act
