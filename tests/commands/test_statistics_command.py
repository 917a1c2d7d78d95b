"""`train.py statistics`: what it collects is what `fit` with the same options finds."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import projection_of
from helpers.runs import command_line, write_corpus

from lit_edit.cli import main
from lit_edit.commands.statistics import spectrum
from lit_edit.statistics import collect_covariances

Folder = Callable[[str], Path]
Said = pytest.CaptureFixture[str]


@pytest.fixture
def options(tiny_folder: Folder, tmp_path: Path) -> list[str]:
    """The options of a fit on a tiny model, with statistics in ``tmp_path``."""
    return [
        *command_line(tiny_folder("gpt2"), tmp_path, "memit", 2)[1:],
        *("--model.cache_dir", str(tmp_path / "cache"), "--model.corpus_tokens", "700"),
    ]


def files(folder: Path, kind: str = "key_covariance") -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").glob(f"{kind}-*")}


def test_fit_finds_what_was_collected(options: list[str], tmp_path: Path, capsys: Said) -> None:
    without = "--model.collect_statistics=false"
    assert main(["fit", *options, without]) == 2
    said = capsys.readouterr().err
    assert "There are no covariances of transformer.h.1.mlp.c_proj.weight, transformer.h.2.mlp." in said
    assert "collect them with `python train.py statistics` and the options of this run" in said

    runs = len(list(tmp_path.glob("memit/*")))
    assert main(["statistics", *options]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^Key covariances of '.*' over 700 tokens of the corpus '.*corpus.*', in the order of the", said)
    assert re.search(r"1 +│ transformer.h.1.mlp.c_proj.weight +│ 48 +│ 18.4 kB +│ missing", said)
    assert re.search(r"all +│ float64 +│ +│ 36.9 kB +│ 2 missing", said)
    assert re.search(r"2 +│ 700 +│ 48 +│ 14.6 +│ 48 +│ \d", said)
    kept = files(tmp_path)
    assert len(kept) == 2
    assert all(f"cache/{name}" in said for name in kept)
    assert len(list(tmp_path.glob("memit/*"))) == runs  # none was begun

    assert main(["fit", *options, without]) == 0
    capsys.readouterr()
    assert main(["statistics", *options, "--layers", "2", "3"]) == 0
    assert re.search(r"there +│\n.*missing +│\n.*1 missing", capsys.readouterr().out)
    now = files(tmp_path)
    assert len(now) == 3
    assert kept.items() <= now.items()


def test_a_data_set_is_not_opened_again(
    options: list[str], tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    texts = write_corpus(tmp_path).read_text(encoding="utf-8").splitlines()
    datasets.Dataset.from_list([{"text": text} for text in texts]).save_to_disk(str(tmp_path / "set"))
    options[options.index("--model.corpus") + 1] = f"hf:{tmp_path / 'set'}"
    assert main(["statistics", *options]) == 0
    assert "shuffled with seed 0 over a buffer of 10,000 records" in capsys.readouterr().out
    monkeypatch.setattr(datasets, "load_from_disk", None)
    assert main(["fit", *options, "--model.collect_statistics=false"]) == 0


def test_layers_alone_and_gradients(tiny_folder: Folder, tmp_path: Path, capsys: Said) -> None:
    command = ["statistics", "--layers", "3", "--model.model", str(tiny_folder("llama")), "--model.corpus_tokens=500"]
    assert main([*command, f"--model.cache_dir={tmp_path / 'cache'}", "--gradients", "--batch_size=2"]) == 0
    assert "Gradients of" in capsys.readouterr().out
    assert len(files(tmp_path)) == len(files(tmp_path, "lm_gradient")) == 1


def test_gradients_of_an_editor_that_needs_them(options: list[str], tmp_path: Path) -> None:
    options[options.index("memit.yaml")] = "o-edit-memit.yaml"
    assert main(["statistics", *options]) == 0
    assert len(files(tmp_path)) == len(files(tmp_path, "lm_gradient")) == 2
    assert main(["fit", *options, "--model.collect_statistics=false"]) == 0


def test_a_small_corpus_is_said_to_be_small(options: list[str], capsys: Said) -> None:
    assert main(["statistics", *options, "--model.corpus_tokens=40", "--model.editor.layers.layers=[1]"]) == 0
    said = capsys.readouterr().out
    assert "note: The key covariance was counted over 40 tokens, fewer than a key's 48 features" in said
    assert re.search(r"1 +│ 40 +│ 48 +│ 0.8 +│ [1-4]\d +│ inf", said)
    assert main(["statistics", *options, "--model.corpus_tokens=1000000"]) == 0
    assert re.search(r"^The corpus has no more than [\d,]+ tokens\.$", capsys.readouterr().out, re.MULTILINE)


def test_a_corpus_of_one_long_text_is_counted_to_its_end(options: list[str], tmp_path: Path, capsys: Said) -> None:
    corpus = tmp_path / "long.txt"
    corpus.write_text(" ".join(write_corpus(tmp_path).read_text(encoding="utf-8").split()), encoding="utf-8")
    number = len(tiny_model("gpt2")[1](corpus.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    assert number > 10 * 128
    given = [*options, "--model.corpus", str(corpus), "--model.corpus_tokens=1000000"]
    assert main(["statistics", *given]) == 0
    said = capsys.readouterr().out
    assert f"\n{number:,} tokens counted in all" in said
    assert f"\nThe corpus has no more than {number:,} tokens.\n" in said


def test_after_ctrl_c_the_same_command_goes_on(
    options: list[str], tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["statistics", *options, "--batch_size=2", f"--model.cache_dir={tmp_path / 'whole'}"]) == 0
    from lit_edit.statistics.covariance import KeyCollector

    count, add = [0], KeyCollector.add

    def pressed(self: KeyCollector, *batch: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGINT)
        add(self, *batch)

    monkeypatch.setattr(KeyCollector, "add", pressed)
    capsys.readouterr()
    assert main(["statistics", *options, "--batch_size=2"]) == 130
    assert capsys.readouterr().out.endswith("Interrupted. The same command goes on from here.\n")
    cut = count[0]
    assert main(["statistics", *options, "--batch_size=2"]) == 0
    assert cut < count[0]
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == whole
    count[0] = 2  # at the first batch, where there is nothing to go on from
    assert main(["statistics", *options, "--batch_size=2", "--model.corpus_tokens=20"]) == 130


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "statistics: for which layers? --config memit.yaml, or --layers 4 5 6."),
        (["--layers", "9"], "Layer 9 does not exist: the model has layers 0 to 3."),
        (["--layers", "1", "1"], "statistics: --layers 1 1 names a layer twice."),
        (["--layers", "one"], "statistics: argument --layers: invalid int value: 'one'"),
        (["--layers", "1", "--save_every=0"], "save_every must be at least 1, got 0."),
        (["--layers", "1", "--model.corpus=hf:"], "hf:: is not of the form hf:owner/name"),
        (["--config", "ft.yaml"], "statistics: FineTune needs none; name --layers"),
        (["--layers", "1", "--model.nonsense=1"], "nonsense"),
    ],
)
def test_errors_end_in_one_line(
    given: list[str], message: str, tiny_folder: Folder, tmp_path: Path, capsys: Said
) -> None:
    model = ["--model.model", str(tiny_folder("gpt2")), "--model.cache_dir", str(tmp_path)]
    assert main(["statistics", *given, *model]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_help_says_what_there_is(capsys: Said) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["statistics", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for option in ("--layers", "--gradients", "--batch_size", "--save_every", "--model.corpus hf:"):
        assert option in said


def test_the_spectrum_is_that_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q
    full = basis @ torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 50], dtype=torch.float64)) @ basis.T
    assert spectrum(full).rank == 6
    assert spectrum(full).condition == pytest.approx(50)
    keys = basis[:, :4]
    assert spectrum(keys @ keys.T).rank == 4
    assert spectrum(keys @ keys.T).condition == float("inf")


def test_the_command_collects_the_covariance_of_the_model(options: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert main(["statistics", *options]) == 0
    model, tokenizer = tiny_model("gpt2")
    texts = [line for line in write_corpus(tmp_path).read_text(encoding="utf-8").splitlines() if line.strip()]
    name = "transformer.h.1.mlp.c_proj.weight"
    expected = collect_covariances(
        model, tokenizer, texts, {name: projection_of(model, 1)}, max_tokens=700, sequence_length=128
    )
    kept: dict[str, Any] = {}
    for path in (tmp_path / "cache").iterdir():
        kept |= load_file(path)
    torch.testing.assert_close(kept[name], expected[name])
