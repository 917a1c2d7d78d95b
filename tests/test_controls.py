"""Every control of the papers runs by its configuration; single edits are scored by their command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import command_line

from lit_edit import LitEdit, load_model
from lit_edit.cli import EditCLI, main
from lit_edit.evaluation.evaluate import Reference, evaluate, figures
from lit_edit.start import at_once

Folder = Callable[[str], Path]

CONTROLS = Path(__file__).resolve().parent.parent / "configs" / "controls"
DESCRIBED = {
    "eac-gradient": "EAC",
    "eac-magnitude": "EAC",
    "eac-random": "EAC",
    "random-additive": "random additive change",
    "random-deletion": "RandomDeletion",
    "random-orthogonal": "random orthogonal change",
    "random-subspace": "RandomSubspace",
    "rome-in-batches": "EMMET",
    "scaling": "Scaling",
    "wilke-memit": "MEMIT, layers by WilKE",
}


def uses(control: str) -> list[list[str]]:
    """The options of every command in a control's header."""
    text = (CONTROLS / f"{control}.yaml").read_text(encoding="utf-8")
    return [line.removeprefix("# fit ").split() for line in text.splitlines() if line.startswith("# fit ")]


def test_every_control_is_known() -> None:
    assert sorted(path.stem for path in CONTROLS.glob("*.yaml")) == sorted(DESCRIBED)
    for control in DESCRIBED:
        assert uses(control)
        assert all(f"controls/{control}.yaml" in use for use in uses(control))


@pytest.mark.parametrize(("control", "use"), [(control, uses(control)[0]) for control in DESCRIBED], ids=DESCRIBED)
def test_a_control_edits_as_its_header_says(control: str, use: list[str], tiny_folder: Folder, tmp_path: Path) -> None:
    configs = re.findall(r"--config (\S+)", " ".join(use))
    given = command_line(tiny_folder("llama"), tmp_path, Path(configs[0]).stem)
    if control.startswith("random-") and len(configs) == 1:  # an editor without values
        given = [option for option in given if not option.startswith("--model.editor")]
        given = [*given, "--model.editor.layers=[1, 2]"]
        given[2] = configs[0]
    place = given.index(next(option for option in given if option.endswith(".yaml"))) + 1
    given[place:place] = [word for config in configs[1:] for word in ("--config", config)]
    if "rome" in configs[0] or "wilke" in configs[0]:
        given = [option for option in given if not option.startswith("--model.editor.layers")]
        layers = "[1]" if "rome" in configs[0] else "[1, 2]"
        given.append(f"--model.editor.layers.layers={layers}")
    if control.startswith("random-subspace"):
        given.append("--model.editor.restraints.max_directions=4")
    given += [option for option in use if option.startswith("--model")]
    batch = 2 if control == "rome-in-batches" else 1
    cli = EditCLI([*given, f"--data.batch_size={batch}", "--trainer.enable_progress_bar=false", "--export.model=false"])
    assert len(cli.model.journal) == 3
    assert all(change > 0 for made in cli.model.journal for change in made.change.values())
    assert DESCRIBED[control] in cli.model.editor.describe()


def test_single_edits_are_those_of_fresh_models(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command_line(tiny_folder("llama"), tmp_path, "rome")[1:]
    out = tmp_path / "single.json"
    assert main(["single", *given, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "ROME, values at BareKey" in said
    assert "3 facts, each alone" in said
    found = json.loads(out.read_text())
    assert (found["edits"], found["method"]) == (3, "ROME, values at BareKey")
    cli = EditCLI([*("fit", *given), "--trainer.enable_progress_bar=false", "--dry_run"])
    outcomes = []
    for request in cli.datamodule.requests:
        model, tokenizer = load_model(str(tiny_folder("llama")))
        module = LitEdit(cli.model.editor, model, tokenizer, corpus=cli.model.preparation.corpus)
        session = module.open([request], next(model.parameters()).device)
        reference = Reference()
        reference.collect(model, module.prompter, [request])
        session.apply(session.plan([request]))
        outcomes += evaluate(model, module.prompter, [request], reference)
    expected = figures(outcomes, ("exact_match",))
    assert {name: found["figures"][name] for name in expected if "/" not in name} == pytest.approx(
        {name: value for name, value in expected.items() if "/" not in name}
    )


def test_single_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert at_once(["single", "--config", "rome.yaml"]) is None
    assert "  single " in str(at_once(["--help"]))


def test_single_needs_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["single"]) == 2
    assert "which method? --config rome.yaml" in capsys.readouterr().err
