"""Nothing that a file names is created without the user's consent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.runs import command_line

from lit_edit.cli import main
from lit_edit.files import load_checkpoint, save_checkpoint
from lit_edit.trust import check_classes, named_classes

Folder = Callable[[str], Path]


@pytest.fixture
def arguments(tiny_folder: Folder, tmp_path: Path) -> list[str]:
    return [*command_line(tiny_folder("llama"), tmp_path, "rome"), "--data.n_edits=2", "--checkpoint.every_n=1"]


def attack(mark: Path) -> dict[str, Any]:
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(mark)]}}


def test_hyper_parameters_of_a_checkpoint_are_ignored(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    run, mark = tmp_path / "rome" / "version_0", tmp_path / "broken-in"
    content = load_checkpoint(run / "checkpoints" / "edits.ckpt")
    for hidden in (
        {"tokenizer": attack(mark)},
        {"cache_dir": str(tmp_path / "elsewhere")},
        {"editor": {"init_args": {"contexts": 0}}},
        {"_class_path": "subprocess.Popen", "args": ["touch", str(mark)]},
    ):
        save_checkpoint(run / "checkpoints" / "crafted.ckpt", {**content, "hyper_parameters": hidden})
        resume = ["--data.n_edits=3", "--ckpt_path", str(run / "checkpoints" / "crafted.ckpt")]
        assert main([*arguments, *resume]) == 0, capsys.readouterr().err
        assert not mark.exists()
        assert not (tmp_path / "elsewhere").exists()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["editor"]["init_args"]["contexts"] == 5


PLACES = (
    "--model.tokenizer={}",
    "--model.editor={}",
    "--model.editor.solver={}",
    "--model.model={}",
    "--data={}",
    "--trainer.callbacks=[{}]",
    "--trainer.logger={}",
    "--trainer.strategy={}",
    "--trainer.profiler={}",
    "--trainer.plugins=[{}]",
    "--model.family={}",
)


@pytest.mark.parametrize("place", PLACES)
def test_no_option_creates_what_is_not_of_its_kind(
    place: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "broken-in"
    option = place.format(json.dumps(attack(mark)))
    assert main([*arguments, option]) == 2
    assert main([*arguments, option, "--trust=subprocess"]) == 2
    assert not mark.exists()
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines() if line)


def test_a_foreign_class_on_the_command_line_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--trainer.callbacks+=theirs.Callback"]) == 2
    assert "names the class 'theirs.Callback', from outside lit_edit" in capsys.readouterr().err


def test_a_foreign_class_in_a_file_is_named_before_its_module_is_imported(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "imported"
    (tmp_path / "their_package.py").write_text(
        f"from lightning import Callback\nopen({str(mark)!r}, 'w').close()\nclass Own(Callback):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "theirs.yaml"
    config.write_text("trainer: {callbacks: [{class_path: their_package.Own}]}")
    assert main([*arguments, "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "names the class 'their_package.Own'" in said
    assert "--trust=their_package" in said
    assert not mark.exists()
    config.write_text("trust: their_package\ntrainer: {callbacks: [{class_path: their_package.Own}]}")
    assert main([*arguments, "--config", str(config)]) == 2
    assert "which only the command line can" in capsys.readouterr().err
    assert not mark.exists()
    config.write_text("trainer: {callbacks: [{class_path: their_package.Own}]}")
    assert main([*arguments, "--config", str(config), "--trust=their_package"]) == 0
    assert mark.exists()


def test_classes_are_found_wherever_they_are_named() -> None:
    shared: dict[str, Any] = {"class_path": "a.B"}
    nested: Any = [shared, {"x": [{"class_path": "c.D", "init_args": {"y": {"class_path": "e.F"}}}]}, (shared,)]
    assert sorted(named_classes(nested)) == ["a.B", "c.D", "e.F"]
    loop: list[Any] = [shared]
    loop.append(loop)  # YAML anchors can make such a thing
    assert list(named_classes(loop)) == ["a.B"]
    check_classes({"class_path": "torch.optim.Adam"}, (), "x")
    check_classes({"class_path": "a.B"}, ("a",), "x")
    check_classes({"class_path": "Retention"}, (), "x")
    for name in ("torchx.Adam", "ab.C", "lit_edit_evil.X"):
        with pytest.raises(ValueError, match=f"x names the class '{name}'"):
            check_classes({"class_path": name}, ("a",), "x")
