"""``train.py statistics``: what `fit` would collect, collected beforehand and resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import write_corpus, write_facts

from lit_edit.cli import main
from lit_edit.commands.statistics import condition
from lit_edit.statistics.kept import kept

Said = pytest.CaptureFixture[str]


@pytest.fixture
def given(tiny_folder: Callable[[str], Path], tmp_path: Path) -> list[str]:
    return [
        *("--model.model", str(tiny_folder("llama")), "--model.corpus", str(write_corpus(tmp_path))),
        *("--model.cache_dir", str(tmp_path / "kept"), "--model.corpus_tokens=600", "--trainer.accelerator=cpu"),
    ]


def test_fit_finds_what_was_collected(given: list[str], tmp_path: Path, capsys: Said) -> None:
    own = ["--config", "memit.yaml", "--model.editor.layers.layers=[1,2]", *given]
    facts = ["--data", "FactsDataModule", "--data.path", str(write_facts(tmp_path, 2)), "--data.n_edits=null"]
    fit = ["fit", *own, *facts, "--model.editor.values.steps=2", "--downstream.n_items=0", "--retention.every_n=9"]
    fit += ["--model.collect_statistics=false", "--trainer.default_root_dir", str(tmp_path)]
    assert main(fit) == 2
    assert "collect it with `lit-edit statistics`" in capsys.readouterr().err
    assert main(["statistics", *own]) == 0
    said = capsys.readouterr().out
    assert "2 missing" in said
    assert "tokens counted in all" in said
    assert said.count(str(tmp_path / "kept")) == 2
    assert main(fit) == 0
    assert main(["statistics", *own]) == 0
    assert "0 missing" in capsys.readouterr().out


def test_what_is_kept_is_listed_and_cleared(given: list[str], tmp_path: Path, capsys: Said) -> None:
    folder = tmp_path / "kept"
    place = ["--model.cache_dir", str(folder)]
    assert main(["statistics", "--list", *place]) == 0
    assert capsys.readouterr().out.startswith("0 files, 0 B, in ")
    assert main(["statistics", "--layers", "1", "2", *given]) == 0
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    old, new = sorted(folder.glob("*.safetensors"))
    os.utime(old, (time.time() - 40 * 86_400,) * 2)
    capsys.readouterr()
    assert main(["statistics", "--list", *place]) == 0
    said = capsys.readouterr().out
    assert "2 files" in said
    assert {made.header.layers for made in kept(folder) if made.header} == {
        ("model.layers.1.mlp.down_proj.weight",), ("model.layers.2.mlp.down_proj.weight",),
    }  # fmt: skip
    assert main(["statistics", "--clear", "--older_than", "30", *place]) == 0
    assert "1 file, " in capsys.readouterr().out
    assert sorted(folder.iterdir()) == sorted([new, folder / "notes.txt"])
    new.write_bytes(b"broken")
    assert main(["statistics", "--clear", *place]) == 0
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_layers_and_gradients_are_collected_whatever_the_editor(given: list[str], tmp_path: Path) -> None:
    assert main(["statistics", "--layers", "0", "3", "--gradients", *given]) == 0
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "kept").iterdir())
    assert names == ["key_covariance"] * 2 + ["lm_gradient"] * 2


def test_after_ctrl_c_the_same_command_resumes(
    given: list[str], tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_edit.statistics.collecting._WINDOW", 1)
    monkeypatch.setattr("lit_edit.statistics.collecting._LONG", 0.0)
    monkeypatch.setattr("lit_edit.statistics.collecting._SHARE", 1e9)
    command = ["statistics", "--layers", "1", "--batch_size=2", *given]
    assert main([*command, "--model.cache_dir", str(tmp_path / "whole")]) == 0
    ran: list[int] = []
    from lit_edit.statistics import KeyCollector

    add = KeyCollector.add

    def interrupted(self: KeyCollector, *args: torch.Tensor) -> None:
        ran.append(1)
        if len(ran) == 4:
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(KeyCollector, "add", interrupted)
    assert main(command) == 130
    assert "The same command resumes from here." in capsys.readouterr().out
    ran[:] = [1] * 10
    assert main(command) == 0
    kept, whole = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("kept", "whole"))
    assert kept == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "for which layers"),
        (["--layers", "1", "1"], "names a layer twice"),
        (["--layers", "9"], "9"),
        (["--config", "ft.yaml", "--model.editor.layers=[1]"], "FineTune needs none"),
        (["--layers", "one"], "invalid int value"),
    ],
)
def test_mistakes_are_named_in_one_line(given: list[str], capsys: Said, arguments: list[str], message: str) -> None:
    options = given if arguments else []
    assert main(["statistics", *arguments, *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_rank_and_condition() -> None:
    assert condition(torch.diag(torch.tensor([4.0, 2.0, 1.0]))) == (3, pytest.approx(4.0))
    rank, number = condition(torch.diag(torch.tensor([4.0, 2.0, 0.0])))
    assert (rank, number) == (2, float("inf"))
