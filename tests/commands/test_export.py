"""`train.py export`: the edited model of a run as plain `transformers` loads it, and what changed as a file."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import tiny_model
from helpers.runs import asked, assert_same_weights, command_line, data, facts, quick_editor, trainer, write_corpus
from lit_edit.callbacks import EditCheckpoint, ExportModel
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_edit import LitEdit, load_delta, load_model
from lit_edit.cli import EditCLI, main
from lit_edit.commands.ask import answer, facts_table, prompts_table
from lit_edit.files import save_checkpoint
from lit_edit.model.prompts import Prompter

Said = pytest.CaptureFixture[str]
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}{% endfor %}"


@dataclass
class Made:
    """A run, the model it started from, and the edited model as it was in memory."""

    run: Path
    original: Path
    edited: Any
    dtype: str


@pytest.fixture(scope="module", params=[("gpt2", "float32"), ("llama", "bfloat16")], ids=lambda p: "-".join(p))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Three edits with MEMIT; GPT-2's embeddings are tied."""
    family, dtype = request.param
    root = tmp_path_factory.mktemp(f"export-{family}")
    original = root / "original"
    model, tokenizer = tiny_model(family)
    model.generation_config.update(repetition_penalty=1.3, max_new_tokens=7)
    model.save_pretrained(original)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(original)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_EDIT_CACHE", str(root / "cache"))
        cli = EditCLI([*command_line(original, root), "--model.dtype", dtype, "--export.delta=true"])
    return Made(root / "memit" / "version_0", original, cli.model.model, dtype)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 2, 30, 7]])).logits


def test_plain_transformers_loads_the_very_model(made: Made, tmp_path: Path, capsys: Said) -> None:
    out, delta = tmp_path / "edited", tmp_path / "deltas" / "edited.safetensors"
    assert main(["export", "--run", str(made.run), "--out", str(out), "--delta", str(delta)]) == 0
    assert "3 edits with MEMIT" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype == getattr(torch, made.dtype)
    torch.testing.assert_close(logits(plain), logits(made.edited), rtol=0, atol=0)
    untouched = load_model(str(made.original), made.dtype)[0]
    assert not torch.equal(logits(plain), logits(untouched))

    assert load_delta(untouched, delta).edits == 3
    assert_same_weights(untouched, plain)
    along_the_way = load_model(str(made.original), made.dtype)[0]
    load_delta(along_the_way, made.run / "delta.safetensors")
    assert_same_weights(along_the_way, plain)


def test_everything_beside_the_weights_is_kept(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    assert main(["export", "--ckpt_path", str(made.run / "checkpoints" / "edits.ckpt"), "--out", str(out)]) == 0
    settings = [GenerationConfig.from_pretrained(folder).to_diff_dict() for folder in (made.original, out)]
    assert settings[0] == settings[1]
    assert settings[1]["repetition_penalty"] == 1.3
    talk = [{"role": "user", "content": "The capital of France is"}]
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (made.original, out))
    assert after.chat_template == TEMPLATE
    assert before.apply_chat_template(talk)["input_ids"] == after.apply_chat_template(talk)["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(out)
    tied = made.edited.config.tie_word_embeddings
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) != tied


def test_a_large_model_is_split_and_loads_the_same(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    assert main(["export", "--run", str(made.run), "--out", str(out), "--max_shard_size", "30KB"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 2
    assert_same_weights(AutoModelForCausalLM.from_pretrained(out), made.edited)


def test_a_thin_delta_keeps_its_tolerance(made: Made, tmp_path: Path, capsys: Said) -> None:
    path = tmp_path / "thin.safetensors"
    assert main(["export", "--run", str(made.run), "--delta", str(path), "--tolerance", "1e-2"]) == 0
    assert "Delta: " in capsys.readouterr().out
    model = load_model(str(made.original), made.dtype)[0]
    header = load_delta(model, path)
    assert header.error <= 1e-2
    edited = dict(made.edited.named_parameters())
    for name, weight in model.named_parameters():
        wanted = edited[name].detach().double()
        assert float((weight.detach().double() - wanted).norm()) <= 1e-2 * float(wanted.norm())


def refused(capsys: Said, *given: Any) -> str:
    assert main(["export", *map(str, given)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize("made", [("gpt2", "float32")], indirect=True, ids=["gpt2"])
def test_what_cannot_be_exported_is_said_in_one_line(made: Made, tmp_path: Path, capsys: Said) -> None:
    out = tmp_path / "out"
    assert refused(capsys, "--run", made.run).startswith("export: what for? --out")
    assert refused(capsys, "--out", out).startswith("Which run?")
    assert refused(capsys, "--run", tmp_path, "--out", out) == (
        f"{tmp_path} is no folder of a run: it has no config.yaml."
    )
    assert "there is something at" in refused(capsys, "--run", made.run, "--out", made.original)
    assert "--tolerance is for a --delta" in refused(capsys, "--run", made.run, "--out", out, "--tolerance", "1e-3")
    assert "no size: 5GB" in refused(capsys, "--run", made.run, "--out", out, "--max_shard_size", "big")
    gone = refused(capsys, "--run", made.run, "--out", out, "--ckpt_path", tmp_path / "none.ckpt")
    assert gone.startswith("There is no checkpoint at")
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"no checkpoint")
    assert "is not a checkpoint that can be read" in refused(
        capsys, "--run", made.run, "--out", out, "--ckpt_path", broken
    )
    save_checkpoint(broken, {"state_dict": {}})
    assert "not made by a run of edits" in refused(capsys, "--run", made.run, "--out", out, "--ckpt_path", broken)
    assert not out.exists()


@pytest.mark.parametrize("made", [("gpt2", "float32")], indirect=True, ids=["gpt2"])
def test_another_model_in_the_original_s_place_is_refused(made: Made, tmp_path: Path, capsys: Said) -> None:
    for name, (family, seed) in {"seed": ("gpt2", 1), "kind": ("qwen2", 0)}.items():
        model, tokenizer = tiny_model(family, seed)
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / name)
    capsys.readouterr()
    given = ("--run", made.run, "--out", tmp_path / "out", "--original")
    for name in ("seed", "kind"):
        assert "was made from another model than" in refused(capsys, *given, tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_ask_shows_what_the_run_has_made_of_its_facts(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    """Answers before and after, from the run's folder alone, are those of the model in memory and of the original."""
    monkeypatch.setenv("COLUMNS", "160")
    file, prompt = made.run.parent.parent / "facts.json", "The capital of Peru is"
    assert main(["ask", prompt, "--run", str(made.run), "--facts", str(file), "--max_new_tokens", "5"]) == 0
    said = capsys.readouterr().out
    original, tokenizer = load_model(str(made.original), made.dtype)
    requests = asked(3)
    models = (original, made.edited)
    before, after = (answer(m, Prompter.of(m, tokenizer), [prompt], requests, 5) for m in models)
    assert made.dtype == "bfloat16" or (before.prompts, before.facts) != (after.prompts, after.facts)
    table = Console(width=160, record=True, file=io.StringIO())
    table.print(prompts_table([prompt], before, after))
    table.print(facts_table(requests, before, after))
    assert said == table.export_text()


@pytest.mark.parametrize("made", [("gpt2", "float32")], indirect=True, ids=["gpt2"])
@pytest.mark.parametrize("setting", [None, "skip", "raise"])
def test_ask_treats_bad_records_as_the_run_did(made: Made, tmp_path: Path, setting: str | None, capsys: Said) -> None:
    run, file = tmp_path / "run", tmp_path / "facts.json"
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("model"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["data"]["init_args"]["on_bad_record"] = "skip"
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    file.write_text(json.dumps([*facts(2), facts(1)[0] | {"subject": "nobody"}]), encoding="utf-8")
    given = ["ask", "--run", str(run), "--facts", str(file), *([f"--on_bad_record={setting}"] if setting else [])]
    if setting == "raise":
        assert main(given) == 2
        assert "record 3, field 'subject': 'nobody' does not occur" in capsys.readouterr().err
        return
    with pytest.warns(UserWarning, match="1 of 3 records cannot be edited and are left out"):
        assert main(given) == 0
    assert "of 2 facts hold" in capsys.readouterr().out


@pytest.fixture
def fit(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., LitEdit]:
    """Edits a tiny model, in one fit or going on from a checkpoint."""

    def run(count: int, *callbacks: Any, resume: Path | None = None) -> LitEdit:
        module = LitEdit(quick_editor("memit"), str(tiny_folder("qwen2")), corpus=str(write_corpus(tmp_path)))
        trainer(tmp_path, *callbacks).fit(module, datamodule=data(tmp_path, count), ckpt_path=resume, weights_only=True)
        return module

    return run


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_the_delta_of_a_resumed_run_starts_from_the_unedited_model(
    fit: Callable[..., LitEdit], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    fit(2, EditCheckpoint(str(tmp_path / "kept")))
    again = (EditCheckpoint(str(tmp_path / "kept")), ExportModel(model=False, delta=True))
    second = fit(4, *again, resume=tmp_path / "kept" / "edits.ckpt")
    model = load_model(str(tiny_folder("qwen2")))[0]
    header = load_delta(model, tmp_path / "delta.safetensors")
    assert (header.edits, header.method) == (4, "MEMIT")
    assert_same_weights(model, second.model)
