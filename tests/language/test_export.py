"""A tuned policy as a folder of transformers, and answers drawn from a run: through the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_policy, write_pairs

import offpolicy as op
from offpolicy import generate
from offpolicy.errors import UsageError
from offpolicy.export import export, main
from offpolicy.language.export import export_model
from offpolicy.language.policy import open_model

IDS = torch.tensor([[1, 5, 9, 7, 30]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    join_characters(make_policy(folder / "policy"))
    write_pairs(folder / "pairs.jsonl")
    return folder


def join_characters(policy: Path) -> None:
    """Let the tokenizer of single characters put no spaces between them."""
    from tokenizers import decoders
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.save_pretrained(policy)


def tuned(place: Path, name: str, **options: Any) -> Path:
    """The folder of a short run."""
    run = place / name
    settings = {"policy": str(place / "policy"), "batch_size": 8, "lr": 1e-2, "ref_cache": str(place / "references")}
    method = op.DPO(**settings | options)
    op.fit(method, str(place / "pairs.jsonl"), max_steps=3, folder=run, verbose=False, matmul="mkl")
    return run


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return tuned(place, "whole")


@pytest.fixture(scope="module")
def adapted(place: Path) -> Path:
    pytest.importorskip("peft")
    return tuned(place, "adapted", lora_rank=2)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_a_whole_model_opens_in_transformers(whole: Path, place: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "out"
    assert main([str(whole), str(out)]) == 0
    assert "whole model" in capsys.readouterr().out
    trained = logits(op.load(whole).model)
    torch.testing.assert_close(logits(opened(out)), trained, rtol=0, atol=0)
    assert not torch.equal(trained, logits(opened(place / "policy")))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("1 + 2")["input_ids"] == AutoTokenizer.from_pretrained(place / "policy")("1 + 2")["input_ids"]
    config = json.loads((out / "config.json").read_text())
    assert config.get("use_cache", True) and (out / "generation_config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no temporary is left


def test_adapters_alone_or_merged(adapted: Path, tmp_path: Path) -> None:
    """Both open as the tuned model; merging adds in another order, so to rounding."""
    method: Any = op.load(adapted)
    trained = logits(method.model)
    beside = export(adapted, tmp_path / "adapter")
    assert (beside / "adapter_config.json").is_file() and not (beside / "model.safetensors").exists()
    torch.testing.assert_close(logits(opened(beside)), trained, rtol=0, atol=0)
    merged = export(method, tmp_path / "merged", merge=True)
    assert (merged / "model.safetensors").is_file() and not (merged / "adapter_config.json").exists()
    torch.testing.assert_close(logits(opened(merged)), trained, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(method.model), trained)  # the method at hand is left as it is


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder's file, which must be of the type that its configuration says."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())["dtype"]
    assert {str(value.dtype) for value in weights.values()} == {f"torch.{said}"}
    return weights


@pytest.fixture(scope="module")
def halved(place: Path) -> Path:
    """The policy with its files in bfloat16, its embeddings and its head being one weight."""
    make_policy(place / "plain", hidden_size=64, intermediate_size=64, initializer_range=0.1, tie_word_embeddings=True)
    export_model(open_model(str(place / "plain")), None, place / "halved", dtype="bfloat16")
    for file in (place / "plain").glob("tokenizer*"):
        shutil.copy(file, place / "halved")
    return place / "halved"


def test_weights_are_written_in_the_type_of_the_policys_files(
    halved: Path, place: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tuned(place, "from_half", policy=str(halved))
    method: Any = op.load(run)
    trained = method.model.state_dict()
    assert method.model.dtype == torch.float32 and method._export_facts()[0][1].startswith("weights in hf/ are made bf")
    written = stored(run / "hf")
    assert written.keys() == stored(halved).keys() and "lm_head.weight" not in written  # one weight is written once
    assert all(torch.equal(value, trained[name].bfloat16()) for name, value in written.items())
    assert opened(run / "hf").dtype == torch.bfloat16
    assert main([str(run), str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    assert "whole model, float32 as asked" in capsys.readouterr().out
    assert all(torch.equal(value, trained[name]) for name, value in stored(tmp_path / "whole").items())
    del method.model.source_dtype  # as of a checkpoint that an earlier version wrote
    assert next(iter(stored(export(method, tmp_path / "again")).values())).dtype == torch.bfloat16
    assert method.model.dtype == torch.float32
    with pytest.raises(UsageError, match="`dtype` is 'int8'"):
        export(method, tmp_path / "never", dtype="int8")


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_merged_adapters_are_written_in_the_type_of_the_policys_files(
    quantize: str | None, halved: Path, tmp_path: Path
) -> None:
    """Four bits become the numbers they stand for, with the adapters added; adapters alone stay as they are."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    model = with_adapters(open_model(str(halved), quantize=quantize))
    expected = logits(model)
    merged = export_model(model, None, tmp_path / "merged", merge=True)
    assert stored(merged)["model.norm.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(logits(opened(merged)).float(), expected, rtol=0.1, atol=0.1)
    exact = export_model(model, None, tmp_path / "exact", merge=True, dtype="float32")
    torch.testing.assert_close(logits(opened(exact)), expected, rtol=1e-3, atol=1e-3)
    alone = load_file(export_model(model, None, tmp_path / "alone") / "adapter_model.safetensors")
    assert {value.dtype for value in alone.values()} == {torch.float32}
    assert torch.equal(logits(model), expected)  # the model at hand is left as it is
    with pytest.raises(UsageError, match="adapters alone are written as they were trained"):
        export_model(model, None, tmp_path / "never", dtype="bfloat16")


def with_adapters(model: Any, *targets: str) -> Any:
    """A model with adapters that change it."""
    from offpolicy.language.policy import add_adapter

    wanted = {"r": 2, "lora_alpha": 4, "target_modules": list(targets) or "all-linear"}
    model = add_adapter(model, wanted)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_biases_and_layers_without_adapters_survive_four_bits(tmp_path: Path) -> None:
    """Weights of an engine have the names of the whole model, no scales of four bits, and every bias."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from offpolicy.language.weights import exported

    make_policy(tmp_path / "policy", hidden_size=64, intermediate_size=64, attention_bias=True)
    plain = open_model(str(tmp_path / "policy"))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    plain.save_pretrained(tmp_path / "policy")
    packed = open_model(str(tmp_path / "policy"), quantize="4bit")
    model = with_adapters(packed, "q_proj")
    for how in ("merge", "keep"):
        found = dict(exported(model, how))
        assert found.keys() == plain.state_dict().keys()
        assert all(torch.equal(v, plain.state_dict()[n]) for n, v in found.items() if n.endswith("bias"))


def test_an_adapter_is_no_policy_but_answers(adapted: Path, place: Path, tmp_path: Path, capsys: Any) -> None:
    from offpolicy.language.policy import open_model

    with pytest.raises(UsageError, match=f"adapter of {place / 'policy'}.*--model.adapter {adapted / 'hf'}"):
        open_model(str(adapted / "hf"))
    options = ("--data", place / "pairs.jsonl", "--prompts", 2, "--max_new_tokens", 4)
    for run, file in ((adapted / "hf", "adapter.jsonl"), (adapted, "run.jsonl")):
        answered(run, *options, "--out", tmp_path / file, say=capsys.readouterr)
    assert (tmp_path / "adapter.jsonl").read_text() == (tmp_path / "run.jsonl").read_text()


def test_a_run_of_adapters_opens_from_another_folder(place: Path, monkeypatch: Any) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(place)
    tuned(place, "moved", lora_rank=2, policy="policy")
    monkeypatch.chdir("/")
    method: Any = op.load(place / "moved")
    torch.testing.assert_close(logits(method.model), logits(opened(place / "moved" / "hf")), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 2, "lora_targets": ["q_proj", "nope"]}, "No layer is called nope.*q_proj"),
        ({"adapter": "{place}/policy"}, "`adapter` is .*no adapter_config.json"),
        ({"reference": "{place}/nowhere"}, "`reference` is .*nowhere"),
        ({"policy": "{place}/torn"}, "`policy` is .*torn', which does not open"),
    ],
)
def test_models_that_are_not_there(options: dict[str, Any], message: str, place: Path) -> None:
    pytest.importorskip("peft")
    if not (place / "torn").exists():
        shutil.copytree(place / "policy", place / "torn")
        (place / "torn" / "model.safetensors").write_bytes((place / "policy" / "model.safetensors").read_bytes()[:99])
    given = {k: v.format(place=place) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UsageError, match=message):
        tuned(place, "never", **given)
    assert not (place / "never").exists()


def test_an_exported_model_is_a_policy(whole: Path, place: Path, tmp_path: Path) -> None:
    out = export(whole, tmp_path / "out")
    method: Any = op.SFT(policy=str(out), batch_size=8)
    pairs = str(place / "pairs.jsonl")
    found = op.fit(method, pairs, max_steps=1, folder=tmp_path / "next", verbose=False, matmul="mkl")
    first, second = op.load(whole).model.state_dict(), op.load(found.folder).model.state_dict()
    assert found.updates == 1 and first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_folder_with_files_is_left_alone(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        export(whole, tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    assert (export(whole, tmp_path / "empty") / "config.json").is_file()
    with pytest.raises(UsageError, match="Found no"):
        export(tmp_path / "nothing", tmp_path / "out")


def test_a_finished_run_leaves_its_model(adapted: Path, place: Path, monkeypatch: Any, tmp_path: Path) -> None:
    """Adapters alone, that name their base by a path that holds anywhere; or merged. What was there is replaced."""
    assert json.loads((adapted / "hf" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        place / "policy"
    )
    method: Any = op.load(adapted)
    torch.testing.assert_close(logits(opened(adapted / "hf")), logits(method.model), rtol=0, atol=0)
    method.hparams.export = "merged"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "of_before").write_text("")
    method.finish_files(tmp_path)
    assert (tmp_path / "hf" / "model.safetensors").is_file() and not (tmp_path / "hf" / "of_before").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    monkeypatch.chdir(place)
    method.hparams.policy = "policy"
    named = json.loads((export(method, tmp_path / "next") / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(place / "policy")


def test_control_methods_are_refused(tmp_path: Path) -> None:
    method: Any = op.TD3BC()
    with pytest.raises(UsageError, match="TD3BC"):
        export(method, tmp_path / "out")


# -- answers -----------------------------------------------------------------------------------------------------------


def answered(*arguments: object, say: Callable[[], Any]) -> str:
    assert generate.main([str(one) for one in arguments]) == 0
    return say().out


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_to_held_out_prompts(whole: Path, capsys: Any) -> None:
    options = ("--num_samples", 2, "--max_new_tokens", 8, "--data.eval_fraction", 0.2)
    out = answered(whole, *options, say=capsys.readouterr)
    assert "tokens per answer" in out and "score" not in out  # the answers have no ####
    (file,) = whole.glob("answers-*.jsonl")
    rows = rows_of(file)
    assert file.name == "answers-step00000003-seed0.jsonl" and 1 <= len(rows) < 40
    for row in rows:
        a, b = (int(number) for number in row["prompt"].split(" = ")[0].split(" + "))
        assert row["reference"] == str(a + b) and len(row["completions"]) == len(row["lengths"]) == 2
    first = file.read_text()
    answered(whole, *options, "--batch_size", 3, say=capsys.readouterr)
    assert file.read_text() == first
    summary = json.loads(file.with_suffix(".json").read_text())
    assert summary["prompts"] == len(rows) and summary["num_samples"] == 2


def test_a_verifier_of_the_user_and_another_file(whole: Path, place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The scored lists that come out are data to train on."""
    (tmp_path / "own_reward.py").write_text("def size(prompt, answer, reference):\n    return float(len(answer))\n")
    monkeypatch.syspath_prepend(tmp_path)
    lines = [json.dumps({"question": f"{i} + 1 = ", "answer": str(i + 1)}) for i in range(5)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    out = tmp_path / "answers.jsonl"
    columns = ("--data.columns.prompt", "question", "--data.columns.completion", "answer")
    arguments = [whole, "--data", tmp_path / "own.jsonl", *columns, "--out", out, "--verifier", "own_reward.size"]
    assert generate.main([str(x) for x in (*arguments, "--prompts", 4, "--max_new_tokens", 6)]) == 0
    rows = rows_of(out)
    assert [row["prompt"] for row in rows] == [f"{i} + 1 = " for i in range(4)]
    assert all(row["scores"] == [float(len(text)) for text in row["completions"]] for row in rows)
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["best_score"] >= numbers["score"] > 0

    from offpolicy.data.texts.module import TextData

    data = TextData(str(out), eval_fraction=0.0, on_bad="drop", max_bad=1.0)
    data.bind_tokenizer(str(place / "policy"))
    assert "pairs" in data.load().tables


def test_answers_of_a_folder_of_transformers(place: Path, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = (place / "policy", "--data", place / "pairs.jsonl", "--prompts", 2, "--max_new_tokens", 3)
    answered(*arguments, "--temperature", 0, say=capsys.readouterr)
    rows = rows_of(tmp_path / "answers.jsonl")
    assert len(rows) == 2 and len({text for row in rows[:1] for text in row["completions"]}) == 1


def test_help_names_every_verifier(capsys: Any) -> None:
    from offpolicy.language.rl.verifiers import VERIFIERS

    with pytest.raises(SystemExit):
        generate.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"auto, none, {', '.join(VERIFIERS)}, or an import path" in said


def test_texts_of_options_stay_as_they_are() -> None:
    given = ["--data.separator", " ", "--data.max_prompt_length", "null", "--data.tokenizer", "null"]
    expected = {"separator": " ", "max_prompt_length": None, "tokenizer": None}
    assert generate.data_options(given) == expected
    assert generate.data_options(["--data.separator", "\n"]) == {"separator": "\n"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.max_lenght", "4"], "Did you mean '--data.max_length'"),
        (["--num_sample", "many"], "num_samples|num_sample"),
        (["--verifier", "exactly"], "no verifier"),
        (["--frobnicate", "1"], "not an option"),
    ],
)
def test_mistakes_are_answered(whole: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate.main([str(whole), *arguments])


def test_a_model_without_a_run(tmp_path: Path) -> None:
    """Any model can be written, with or without a tokenizer, and goes on as it was."""
    model = open_model(str(make_policy(tmp_path / "policy")))
    model.config.use_cache = False  # as in training
    out = export_model(model, None, tmp_path / "out")
    opened = open_model(str(out))
    assert opened.config.use_cache and not model.config.use_cache
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)
    with pytest.raises(UsageError, match="exists already"):
        export_model(model, None, out)
