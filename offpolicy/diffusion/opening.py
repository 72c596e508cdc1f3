"""Runs that trajectories are drawn with: diffusion models, and policies that guide them."""

from __future__ import annotations

from pathlib import Path

from offpolicy.data.replay import Replay
from offpolicy.data.sizes import Sizes
from offpolicy.errors import UsageError
from offpolicy.training.offline import OfflineModule
from offpolicy.training.opening import load


def open_model(model: OfflineModule | str | Path | None) -> OfflineModule:
    """A model that generates trajectories.

    Raises:
        UsageError: none given, no such run, or a run of another kind.
    """
    return _open_maker(model, "diffusion model", "TrajectoryDiffusion", "generate", "generates no trajectories")


def open_world_model(model: OfflineModule | str | Path | None) -> OfflineModule:
    """A model that policies are rolled out in. Raises as :func:`open_model` does."""
    return _open_maker(model, "world model", "WorldModel", "rollout", "rolls no policy out")


def _open_maker(
    model: OfflineModule | str | Path | None, what: str, kind: str, ability: str, lack: str
) -> OfflineModule:
    """A model of a kind, which is known by what it can do."""
    if model is None:
        raise UsageError(
            f"no {what} is given; expected the run folder of one. Train it with `python -m offpolicy.fit --model "
            f"{kind} --data NAME` and pass --data.synthetic.model RUN."
        )
    found = open_method(model)
    if not callable(getattr(found, ability, None)):
        where = f"{model} is a run of " if not isinstance(model, OfflineModule) else "the model is "
        raise UsageError(f"{where}{type(found).__name__}, which {lack}; expected one of {kind}.")
    return found


def check_same_data(model: OfflineModule, real: Replay, run: object, what: str, kind: str) -> None:
    """Refuse a model of other sizes or other data than the real ones (UsageError).

    Args:
        run: how the user named the model.
        what: it is, in words.
        kind: name of its method.
    """
    made, name = Sizes.of(real), real.meta.get("name")
    if (made.obs_dim, made.action_dim) != (model.sizes.obs_dim, model.sizes.action_dim):
        raise UsageError(
            f"the {what} {run} makes {dims_text(model.sizes)}, but {name} has {dims_text(made)}; expected the same. "
            "Train one on these data."
        )
    before = model.data_meta.get("name")
    if before != name:
        raise UsageError(
            f"the {what} {run} was trained on {before}, but the data are {name}; expected the same. Train one with "
            f"`python -m offpolicy.fit --model {kind} --data {real.meta.get('file') or name}`."
        )


def open_policy(policy: OfflineModule | str | Path, model: OfflineModule) -> OfflineModule:
    """A policy that can guide the model.

    Raises:
        UsageError: it was built for other sizes, or its actions have no probabilities.
    """
    found = open_method(policy)
    if (found.sizes.obs_dim, found.sizes.action_dim) != (model.sizes.obs_dim, model.sizes.action_dim):
        raise UsageError(
            f"the policy takes {dims_text(found.sizes)} and the diffusion model makes {dims_text(model.sizes)}; "
            "expected the same. Choose runs on the same data."
        )
    check_guides(found)
    return found


def check_guides(policy: OfflineModule) -> None:
    """Raise the error of a method whose actions have no probabilities, before hours of training."""
    sizes, weight = policy.sizes, next(policy.parameters())
    policy.log_prob(weight.new_zeros(1, sizes.obs_dim), weight.new_zeros(1, sizes.action_dim))


def has_law(policy: OfflineModule) -> bool:
    """Whether the actions of a method have probabilities."""
    try:
        check_guides(policy)
    except UsageError:
        return False
    return True


def open_method(run: OfflineModule | str | Path) -> OfflineModule:
    """A method of control: itself, or from its run folder or checkpoint. Raises :class:`UsageError` for others."""
    if isinstance(run, OfflineModule):
        return run
    found = load(run)
    if not isinstance(found, OfflineModule):
        raise UsageError(f"{run} is a run of {type(found).__name__}, a language model; expected a method of control.")
    return found


def dims_text(sizes: Sizes) -> str:
    """Widths in words."""
    return f"{sizes.obs_dim} numbers of observation and {sizes.action_dim} of action"
