"""The check of a batch that comes from outside of the library's own sampling."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offpolicy.data.extras import Extra
from offpolicy.errors import UsageError

ENDINGS = ("reward", "terminated", "discount", "mask", "full", "return_to_go")  # fields with one number per row


def check_rows(batch: Any) -> None:
    """Fields with one number per row must have the axes of the rows, and no axis of one beside them.

    A reward of shape (B, 1) would turn into (B, B) beside values (B,) in a loss, without an error. Only shapes are
    looked at, so nothing is read back from a device.

    Args:
        batch: a named tuple of tensors with ``action (…, B, A)``, as views give it; others are left alone.

    Raises:
        UsageError: a field has another shape.
    """
    action = getattr(batch, "action", None)
    if not isinstance(action, Tensor) or not hasattr(batch, "_asdict"):
        return
    if action.dim() < 2:
        raise UsageError(
            f"`action` of the batch has shape {tuple(action.shape)}; expected (B, A), the numbers of an action in "
            "each row. Pass `action.unsqueeze(-1)` where an action is one number."
        )
    rows = action.shape[:-1]
    columns = {f"extra.{name}": value for name, value in vars(getattr(batch, "extra", None) or Extra()).items()}
    for name, value in (batch._asdict() | columns).items():
        if not isinstance(value, Tensor) or name == "row":  # of windows one per window
            continue
        scalar = name.endswith(ENDINGS) and name not in columns
        found = value.shape if scalar else value.shape[: len(rows)]
        if found != rows:
            wanted = f"({', '.join(map(str, rows))}{',' if len(rows) == 1 else ''}{'' if scalar else ' …'})"
            raise UsageError(
                f"`{name}` of the batch has shape {tuple(value.shape)} and `action` {tuple(action.shape)}; expected "
                f"{wanted}" + (f", one number per row. Pass `{name}.squeeze(-1)`." if scalar else ", the same rows.")
            )
