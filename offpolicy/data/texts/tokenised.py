"""What data modules of texts share: a tokenizer that is known late, and a held-out part."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

from offpolicy.data.module import DataModule
from offpolicy.data.replay import Replay
from offpolicy.errors import DataError, UsageError, check_range
from offpolicy.given import tidy


class TokenisedData(DataModule):
    """Texts of one kind for the Trainer; ``.replay`` is the training part, ``.eval_replay`` the held-out part or None.

    Attributes:
        content: what the texts are, for messages.
    """

    content: ClassVar[str] = "texts"

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__(name)
        tidy(options, {field: p.annotation for field, p in inspect.signature(type(self)).parameters.items()})
        check_range("data.max_bad", options["max_bad"], 0.0, 1.0)
        check_range("data.eval_fraction", options["eval_fraction"], 0.0, 1.0, upper_open=True)
        check_range("data.show", options["show"], 0)
        self.options = options
        self.eval_replay: Replay | None = None
        self._tokenizer: Any = None

    @classmethod
    def of(cls, replay: Replay, eval_replay: Replay | None = None) -> Self:
        """A data module around replays at hand."""
        module = cls(str(replay.meta.get("name", cls.content)))  # type: ignore[call-arg]
        module.replay, module.eval_replay = replay, eval_replay
        return module

    def bind_tokenizer(self, tokenizer: Any) -> None:
        """Say how texts become tokens, before :meth:`load`; without effect where ``tokenizer`` was given by name.

        Args:
            tokenizer: a tokenizer of ``transformers``, or its folder or name.

        Raises:
            DataError: the data are open already and were made with another tokenizer.
        """
        if self.options["tokenizer"] is None:
            self._tokenizer = tokenizer
        if self.replay is not None:
            self._check_tokenizer(self.replay)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of these data, a ``PreTrainedTokenizerBase``.

        Raises:
            UsageError: neither ``tokenizer`` nor a policy names one.
        """
        from offpolicy.data.texts.tokens import load_tokenizer

        chosen = self.options["tokenizer"] if self._tokenizer is None else self._tokenizer
        if chosen is None:
            raise UsageError(
                f"no tokenizer is known for the {self.content}; expected the policy's or one by name. Pass "
                "`--data.tokenizer DIR`."
            )
        self._tokenizer = load_tokenizer(chosen)
        return self._tokenizer

    def _check_tokenizer(self, replay: Replay) -> None:
        from offpolicy.data.texts.tokens import fingerprint

        made = replay.meta.get("tokenizer", {}).get("fingerprint")
        if made is not None and made != fingerprint(self.tokenizer):
            raise DataError(
                f"{replay.meta.get('name')} was tokenised with {replay.meta['tokenizer'].get('name')}, which differs "
                f"from {getattr(self.tokenizer, 'name_or_path', 'the tokenizer')} of the policy. Convert the "
                f"{self.content} again with the tokenizer of the policy."
            )
