"""Writes the table of published variants in docs/objective.md from the code.

usage: python examples/rlvr/objective_table.py [--measure] [--steps [NAMES]] [--check]

``--measure`` takes the processor time of the objective of each variant beside GRPO's: facts of the step, loss and
gradient by the tokens' log-probabilities, without a model, for 64 answers of at most 256 tokens; median over
interleaved rounds. ``--steps`` takes that of whole iterations of GRPO with each variant, or with those named, of one
step unless the variant makes several sweeps, drawing and scoring included: 32 answers of at most 12 tokens of a Llama
with random weights, 2 layers, 64 wide, 2,048 tokens in its vocabulary; the least of the last six of eight. Both numbers
are of the machine that takes them, on one thread, to be compared with each other. Without an option its column stays as
it is. ``--check`` changes nothing and exits with 1 where the page is not what the code says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from offpolicy.errors import DataError, UsageError
from offpolicy.losses.answers import OF_POLICY
from offpolicy.losses.policy_gradient import Objective, Tokens, Totals
from offpolicy.losses.variants import VARIANTS, Variant
from offpolicy.losses.variants.absent import ABSENT
from offpolicy.losses.variants.choosing import spec_words

PAGE = Path(__file__).parents[2] / "docs" / "objective.md"
BEGIN, END = "<!-- table: python examples/rlvr/objective_table.py -->", "<!-- end of the table -->"
HEAD = (
    "variant",
    "paper",
    "what it changes",
    "parts",
    "tested by",
    "old answers",
    "needs",
    "passes more",
    "ms",
    "step, ms",
)
ROWS, GROUP, LENGTH, ROUNDS = 64, 8, 256, 15


def passes(variant: Variant) -> str:
    """Forward passes beside those of GRPO."""
    if variant.method:
        return "see the method"
    objective, found = Objective(**variant.parts), []
    if objective.sees_step:
        found.append("1 where a step is cut")
    if "shift" in objective.reads:
        found.append("1, and the gradient of the output layer")
    if objective.reads_of_answers & OF_POLICY or "mean_log_ratio" in objective.reads:
        found.append("the first step's answers")
    found += [f"1 of {words}" for name, words in (("base_logp", "the base"), ("base_kl", "the base, whole vocabulary"),
              ("previous_kl", "π_k, whole vocabulary")) if name in objective.reads]  # fmt: skip
    return "; ".join(found)


def linked(paper: str) -> str:
    """An arXiv number with its link."""
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:1].isdigit() else paper


def absent() -> str:
    """The section on published methods that are not here."""
    rows = (one for one in ABSENT.values() if one.name not in VARIANTS)
    lines = ["## Published methods that are not here", "", "| method | why |", "|---|---|"]
    return "\n".join([*lines, *(f"| {f'{one.title} {linked(one.paper)}'.strip()} | {one.reason} |" for one in rows)])


def cells(variant: Variant) -> list[str]:
    """The row of a variant, without the measured column."""
    parts = [f"{slot} `{spec_words(spec, '')}`" for slot, spec in variant.parts.items() if spec not in ("none", ())]
    parts += [f"`{name} {value}`" for name, value in variant.options.items()]
    name = f"`--model {variant.method}`" if variant.method else f"`{variant.name}`"
    paper = linked(variant.paper)
    notes = {"Paper and code": variant.differs, "Unverified": variant.unverified}
    changes = variant.formula + "".join(f". {label}: {text}" for label, text in notes.items() if text)
    row = [name, f"{variant.title} {paper}".strip(), changes, "; ".join(parts)]
    row += [variant.tested, variant.off_policy, variant.needs, passes(variant)]
    return [re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row]


def measured() -> dict[str, str]:
    """Milliseconds of each objective, by the first column of its row."""
    made = {cells(v)[0]: Objective(**v.parts) for v in VARIANTS.values() if not v.method}
    spent: dict[str, list[float]] = {name: [] for name in made}
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    grid, row = (ROWS, LENGTH), torch.arange(ROWS)
    mask = (torch.arange(LENGTH) < torch.randint(64, LENGTH + 1, (ROWS, 1), generator=generator)).float()
    fields: dict[str, Any] = {name: -drawn(*grid) for name in Tokens._fields if name.endswith("logp")}
    fields |= {name: drawn(*grid) for name in Tokens._fields if name not in fields}
    turn = torch.where(mask > 0, 0, -1)
    columns = {"group": row // GROUP, "prompt": row // GROUP, "reward": drawn(ROWS).round(), "ended": row % 7 > 0}
    columns |= {"length": mask.sum(-1).long(), "turn": turn, "segment": turn, "weight": drawn(ROWS)}
    columns |= {"tempered": row % GROUP == 1}
    columns |= {name: drawn(*grid) for one in made.values() for name in one.columns - columns.keys()}
    fields |= {"mask": mask, "advantage": drawn(ROWS) - 0.5, "lag": row % 2, "step": None, "columns": columns}
    fields |= {"external": (row % GROUP == 0)[:, None].expand(grid)}
    totals = Totals(ROWS, int(mask.sum()), LENGTH, LENGTH)
    for _ in range(ROUNDS):
        for name, objective in made.items():
            given = Tokens(**{**fields, "logp": fields["logp"].clone().requires_grad_()})
            began = time.process_time()
            objective.rate_factor(given, iteration=1)
            loss, _ = objective.loss(given, totals, iteration=1, health=False)
            loss.backward()
            spent[name].append(1e3 * (time.process_time() - began))
    return {name: f"{statistics.median(times):.1f}" for name, times in spent.items()}


def make_policy(folder: Path) -> None:
    """A Llama with random weights, and a tokenizer for sums."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [*"0123456789+=", "<eos>", "<pad>", *(f"<{i}>" for i in range(2034))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 12, "pad_token_id": 13}
    sizes = {"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=128, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)


def measured_steps(names: Collection[str]) -> dict[str, str]:
    """Milliseconds of an iteration of one step with these variants, or with all, by the first column of its row."""
    import logging

    from lightning.pytorch import Callback

    import offpolicy as op
    from offpolicy.data.texts.problems import ProblemData

    logging.disable()

    class Clock(Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.ends.append(1e3 * time.process_time())

    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_policy(folder / "policy")
        rows = [
            {"prompt": f"{a}+{b}=", "answer": str(a + b), "solution": str(a + b)}
            for a in range(10, 40)
            for b in range(10)
        ]
        (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        usual: dict[str, Any] = {"max_new_tokens": 12, "group_size": 8, "batch_size": 32, "lr": 1e-5, "export": "none"}
        chosen = [v for v in VARIANTS.values() if not v.method and v.name in (names or VARIANTS)]
        for i, variant in enumerate([chosen[0], *chosen]):  # the first is slow in a new process
            clock, sizes = Clock(), {k: v for k, v in variant.options.items() if k in ("group_size", "batch_size")}
            try:
                method = op.GRPO(policy=str(folder / "policy"), variant=variant.name, **(usual | sizes))
                data = ProblemData(str(folder / "sums.jsonl"), show=0)
                each = method.hparams.sweeps * method.hparams.minibatches  # steps of an iteration
                op.fit(method, data, max_steps=8 * each, seed=0, folder=folder / f"{i}", eval_every=0, threads=1,
                       verbose=False, save_every=0, callbacks=[clock])  # fmt: skip
            except (DataError, UsageError) as error:  # it asks for what these data, or any here, do not have
                print(f"{variant.name}: {error}", file=sys.stderr)
                continue
            times = [after - before for before, after in itertools.pairwise(clock.ends[each - 1 :: each])]
            found[cells(variant)[0]] = f"{min(times[-6:]):.0f}"
    return found


def table(times: Mapping[str, str], steps: Mapping[str, str]) -> str:
    """The table, with these times where they are known."""
    rows = [cells(variant) for variant in VARIANTS.values()]
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    both = ([*row, times.get(row[0], "–"), steps.get(row[0], "–")] for row in rows)
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in both)])


def known_times(page: str, column: str = "ms") -> dict[str, str]:
    """A measured column of a page, by the first."""
    rows = [re.split(r"(?<!\\)\|", line) for line in page.splitlines() if line.startswith("| `")]
    place = HEAD.index(column) + 1
    return {row[1].strip(): row[place].strip() for row in rows if len(row) == len(HEAD) + 2}


def page_of(page: str, times: Mapping[str, str], steps: Mapping[str, str]) -> str:
    """A page with the table that the code says."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(times, steps)}\n\n{absent()}\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--steps", nargs="*")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    page = PAGE.read_text()
    times = measured() if args.measure else known_times(page)
    steps = known_times(page, "step, ms") | ({} if args.steps is None else measured_steps(args.steps))
    made = page_of(page, times, steps)
    if args.check:
        return int(made != page)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
