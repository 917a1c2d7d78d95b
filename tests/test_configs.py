"""Every configuration makes edits on the embedded model; parts go together by YAML alone; what real models get."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.runs import write_corpus, write_facts
from jsonargparse import ArgumentParser, Namespace
from lit_edit.configs.find import find_config
from lit_edit.datamodules import EditDataModule
from torch import Tensor

from lit_edit import LitEdit, load_model
from lit_edit.cli import EditCLI, main
from lit_edit.editors import Editor

Folder = Callable[[str], Path]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
METHODS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
OVERLAYS = sorted(
    path.relative_to(CONFIGS / "models").with_suffix("").as_posix() for path in CONFIGS.glob("models/*/*")
)
MODELS = sorted(path.stem for path in CONFIGS.glob("models/*.yaml"))
PRESETS = sorted(path.stem for path in CONFIGS.glob("presets/*"))
ORTHOGONAL = ("mose", "mose-key", "mose-oft")


def content(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


# On the embedded model


def fewer_steps(part: Mapping[str, Any]) -> dict[str, Any]:
    """An overlay that cuts every ``steps`` of a configuration to 2, whatever part it belongs to."""
    overlay: dict[str, Any] = {}
    for key, value in part.items():
        if isinstance(value, dict):
            if below := fewer_steps(value):
                overlay[key] = below
        elif key.split("_")[-1] == "steps" and isinstance(value, int):
            overlay[key] = min(value, 2)
    return overlay


@pytest.fixture(scope="module")
def untouched() -> dict[str, Tensor]:
    """The weights of the embedded model."""
    return {name: weight.clone() for name, weight in load_model()[0].state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_makes_ten_edits(method: str, tmp_path: Path, untouched: dict[str, Tensor]) -> None:
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump({"model": fewer_steps(content(method)["model"])}))
    cli = EditCLI(
        [
            *("fit", "--config", f"{method}.yaml", "--config", str(tmp_path / "quick.yaml")),
            *("--data.n_edits=10", "--model.corpus_tokens=4000", "--trainer.accelerator=cpu"),
            *("--retention.every_n=1000", "--retention.at_start=false", "--retention.at_end=false"),
            *("--stability.every_n=1000", "--stability.at_start=false", "--stability.at_end=false"),
            *("--downstream.n_items=0", "--checkpoint.every_n=1000", "--export.model=false"),
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    journal = cli.model.journal
    assert [edit.number for edit in journal] == list(range(1, 11))
    assert len({edit.case_id for edit in journal}) == 10
    assert all(0 <= edit.p_target <= 1 and edit.seconds > 0 for edit in journal)
    assert all(edit.layers and all(change > 0 for change in edit.change.values()) for edit in journal)
    now = cli.model.model.state_dict()
    changed = {name for name, weight in now.items() if not torch.equal(weight, untouched[name])}
    assert changed
    assert changed <= set(cli.model.edited_parameters())
    for name in changed:
        assert bool(torch.isfinite(now[name]).all())
        if method in ORTHOGONAL:
            before, after = (torch.linalg.svdvals(w.double()) for w in (untouched[name], now[name]))
            torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    if method not in ORTHOGONAL:
        sizes = [(now[name].double().norm().item(), untouched[name].double().norm().item()) for name in changed]
        assert any(after != pytest.approx(before, rel=1e-9) for after, before in sizes)


# Put together by YAML alone


COMBINATIONS = {
    "MEMIT with EAC + PRUNE": (
        "memit",
        """
        values: {init_args: {schedule: {class_path: lit_edit.editors.values.EAC, init_args: {percentile: 50}}}}
        restraints: [{class_path: lit_edit.editors.restraints.PRUNE, init_args: {every_n: 2}}]
        """,
    ),
    "AlphaEdit + RECT": ("alphaedit", "restraints: [{class_path: lit_edit.editors.restraints.RECT}]"),
    "EMMET + OEditPlus": ("emmet", "restraints: [{class_path: lit_edit.editors.restraints.OEditPlus}]"),
    "ROME, layers by WilKE": ("wilke", "value_keys: null"),
    "ROME with EAC, OEdit + RECT + PRUNE, values at BareKey": (
        "rome",
        """
        values:
          init_args:
            schedule: {class_path: lit_edit.editors.values.EAC}
            penalties: [{class_path: lit_edit.editors.values.OEdit}]
        restraints: [{class_path: lit_edit.editors.restraints.RECT}, {class_path: lit_edit.editors.restraints.PRUNE}]
        """,
    ),
}

Command = Callable[[str, str], list[str]]


@pytest.fixture
def command(tiny_folder: Folder, tmp_path: Path) -> Command:
    """A command line for a method on a tiny model, with settings of its editor laid over it."""

    def compose(method: str, editor: str) -> list[str]:
        overlay = {"model": {"editor": {"init_args": yaml.safe_load(editor)}}}
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
        layers = {"rome": "[1]"}.get(method, "[1,2]")
        return [
            *("fit", "--config", f"{method}.yaml", "--config", str(tmp_path / "overlay.yaml")),
            *("--model.model", str(tiny_folder("llama")), "--model.corpus", str(write_corpus(tmp_path))),
            *([] if method in ORTHOGONAL else [f"--model.editor.layers.layers={layers}"]),
            *("--model.editor.values.steps=4", "--model.editor.contexts=1", "--data", "FactsDataModule"),
            *("--data.path", str(write_facts(tmp_path, 3)), "--data.n_edits=null", "--downstream.n_items=0"),
            *("--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}", "--export.model=false"),
            "--trainer.enable_progress_bar=false",
        ]

    return compose


@pytest.mark.parametrize("name", COMBINATIONS)
def test_methods_are_put_together_by_yaml(command: Command, name: str) -> None:
    cli = EditCLI(command(*COMBINATIONS[name]))
    assert cli.model.editor.describe() == name
    assert len(cli.model.journal) == 3
    assert all(change > 0 for edit in cli.model.journal for change in edit.change.values())
    assert all(bool(torch.isfinite(weight).all()) for weight in cli.model.edited_parameters().values())


@pytest.mark.parametrize(
    ("method", "editor", "message"),
    [
        (
            "mose",
            "restraints: [{class_path: lit_edit.editors.restraints.RECT}]",
            "RECT restrains what is added to a weight, and",
        ),
        ("mose-key", "restraints: [{class_path: lit_edit.editors.restraints.PRUNE}]", "PRUNE restrains what is added"),
        ("memit", "value_keys: {class_path: lit_edit.editors.keys.BareKey}", "MEMIT has one key per request"),
        (
            "memit",
            "values: {init_args: {constraint: {class_path: lit_edit.editors.values.NormMatched}}}",
            "Norm-matched values need `site: mlp`",
        ),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(
    command: Command, capsys: pytest.CaptureFixture[str], method: str, editor: str, message: str
) -> None:
    assert main(command(method, editor)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


# For real models


@cache
def composed(method: str, *overlays: str) -> tuple[dict[str, Any], Editor]:
    """The settings of ``model`` as ``fit`` composes them, and the editor made from them; no model is loaded."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(LitEdit, "model")
    parser.add_subclass_arguments(EditDataModule, "data")
    given = [part for name in (method, *overlays) for part in ("--config", find_config(name))]
    settings = parser.parse_args(given).as_dict()["model"]
    alone = ArgumentParser(exit_on_error=False)
    alone.add_argument("--editor", type=Editor)
    return settings, alone.instantiate(alone.parse_object({"editor": settings["editor"]})).editor


def flat(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name, ``init_args`` and list positions left out."""
    if isinstance(part, Namespace):
        part = part.as_dict()
    if isinstance(part, list) and part and isinstance(part[0], (dict, Namespace)):
        for item in part:
            yield from flat(item, path)
    elif isinstance(part, dict):
        for key, value in part.items():
            yield from flat(value, path if key == "init_args" else f"{path}.{key}".lstrip("."))
    else:
        yield path, part


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_composes_with_its_method(overlay: str) -> None:
    model, method = overlay.split("/")
    assert find_config(f"models/{overlay}") == find_config(f"models/{overlay}.yaml")
    settings, editor = composed(method, f"models/{overlay}.yaml")
    assert isinstance(editor, Editor)
    assert isinstance(editor, type(composed(method)[1]))
    assert settings["model"] == content(f"models/{model}")["model"]["model"]
    # Everything that the overlay says is what is composed.
    found = dict(flat(settings))
    for name, value in flat(content(f"models/{overlay}")["model"]):
        assert found[name] == value, name


@pytest.mark.parametrize("overlay", [f"models/{name}" for name in OVERLAYS] + [f"presets/{name}" for name in PRESETS])
def test_every_value_of_an_overlay_has_its_source_beside_it(overlay: str) -> None:
    lines = (CONFIGS / f"{overlay}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    if overlay.startswith("models/"):
        assert lines[1].endswith(f"fit --config {overlay.split('/')[2]}.yaml --config {overlay}.yaml")
    for line in lines:
        name, _, value = line.strip().partition(":")
        if line.startswith("#") or not value or name in ("model", "dtype", "- class_path", "class_path"):
            continue
        assert "  # " in line, line


# What an overlay may leave to the method's own configuration: so long as it has one of these values there, and for this
# reason. Anything else that it does not state is a constant chosen on the embedded model, passed off as published.
UNSAID: dict[str, tuple[tuple[Any, ...], str]] = {
    "value_keys": ((None,), "a part that the method has not"),
    "restraints": ((None,), "a part that the method has not"),
    "values.penalties": ((None,), "a part that the method has not"),
    "values.schedule": ((None,), "a part that the method has not"),
    "elastic_net": ((None,), "a part that the method has not"),
    "layers.solver": ((None,), "the comparison's solver is ROME, as published"),
    "layers.steps": ((None,), "as many as the edit itself has"),
    "layers.reach": ((None,), "the published rule has no such limit"),
    "values.site": (("mlp", "block"), "what v* is a value of is the method's, not the model's"),
    "values.stop_loss": ((0.05,), "the same in every source"),
    "values.complete_passes": ((False,), "a matter of speed; both give the same values"),
    "values.max_rows": ((None,), "a matter of memory; any number gives the same values"),
    "values.schedule.saliency": ((True,), "the method; false is an ablation"),
    "values.schedule.elastic_net": ((True,), "the method; false is an ablation"),
    "values.schedule.eps": ((1e-8,), "published without a number: it only keeps a division from failing"),
    "solver.covariance": (
        (True,),
        "ROME's paper and code; presets/rome-identity.yaml does as the toolkit",
    ),
    "solver.preservation": ((1.0,), "cancels in ROME without memory"),
    "solver.memory": ((True, False), "whether there is one is the method's: in AlphaEdit alone"),
    "restraints.keep": ((0.2,), "RECT's text; presets/rect-as-released.yaml has the other number"),
    "restraints.beta": ((2.0,), "of the linear form, which no overlay takes"),
    "objective": (("last_token", "target_tokens"), "what FT and FT-L differ in from FT-M"),
    "stop_loss": ((0.01,), "the same in every source"),
    "norm_constraint": ((None,), "EAC's appendix E has none"),
    "elastic_net.eps": ((1e-8,), "unused without a score"),
}


@cache
def inherited(overlay: str) -> dict[str, Any]:
    """What an overlay leaves to the method's own configuration."""
    said = {name for name, _ in flat(content(f"models/{overlay}")["model"]["editor"])}
    found = flat(composed(overlay.split("/")[1], f"models/{overlay}")[0]["editor"])
    return {name: value for name, value in found if name not in said and not name.endswith("class_path")}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_takes_no_constant_from_the_embedded_model(overlay: str) -> None:
    left = inherited(overlay)
    assert {name: value for name, value in left.items() if value not in UNSAID.get(name, ((), ""))[0]} == {}
    assert left.get("solver.memory", False) == overlay.endswith("/alphaedit")


def test_nothing_is_excused_that_no_overlay_leaves_out() -> None:
    assert UNSAID.keys() <= {name for overlay in OVERLAYS for name in inherited(overlay)}


# Presets: where a paper and its code differ, ablations, and what a data set changes


def lines_of_use(preset: str) -> list[list[str]]:
    """The configurations of every command in a preset's header."""
    text = (CONFIGS / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
    return [re.findall(r"--config (\S+)", line) for line in text.splitlines() if line.startswith("# fit ")]


# What every preset changes, by dotted name.
SWITCHES: dict[str, dict[str, Any]] = {
    "alphaedit-as-printed": {"solver.ridge": 1},
    "eac-no-elastic-net": {"values.schedule.elastic_net": False},
    "eac-no-saliency": {"values.schedule.saliency": False},
    "eac-rome-as-released": {"values.schedule.l1": 0},
    "eac-rome-zsre-llama3-8b": {"values.schedule.percentile": 90},
    "eac-zsre-gpt2-xl": {"values.schedule.percentile": 80},
    "emmet-as-released": {"solver.ridge": 0.1},
    "mose-fixed-layer": {"layers.layers": [3]},
    "mose-selected-layer": {"layers.neighbours": 0},
    "mose-selected-and-neighbours": {"layers.neighbours": 1},
    "prune-log-1.2": {"restraints.alpha": 1.2, "restraints.form": "log", "restraints.every_n": None},
    "prune-log-e": {"restraints.alpha": math.e, "restraints.form": "log", "restraints.every_n": None},
    "rect-as-published": {"restraints.keep": 0.2},
    "rect-as-released": {"restraints.keep": 0.4},
    "rome-identity": {"solver.covariance": False},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_what_it_says_and_nothing_else(preset: str) -> None:
    assert lines_of_use(preset)
    for *others, last in lines_of_use(preset):
        assert find_config(last) == find_config(f"presets/{preset}")
        before = dict(flat(composed(others[0], *others[1:])[0]["editor"]))
        after = dict(flat(composed(others[0], *others[1:], last)[0]["editor"]))
        assert {name: after[name] for name in SWITCHES[preset]} == SWITCHES[preset]
        part = {"mose-fixed-layer": "layers"}.get(preset, "restraints")  # a part that is put in or exchanged
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert {n for n in changed - SWITCHES[preset].keys() if n.split(".")[0] != part} == set()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_stands_in_the_card_of_every_method_it_is_for(preset: str) -> None:
    for use in lines_of_use(preset):
        card = CONFIGS.parent / "docs" / "methods" / f"{Path(use[0]).stem}.md"
        assert f"`presets/{preset}.yaml`" in card.read_text(encoding="utf-8"), card.name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_makes_edits(command: Command, preset: str) -> None:
    method = Path(lines_of_use(preset)[0][0]).stem
    given = command(method, "{}")
    given[5:5] = ["--config", f"presets/{preset}.yaml"]
    # Nothing in the last layer, which the preset has for a deeper model, reaches a later token.
    layer = ["--model.editor.layers.layers=[2]"] if preset == "mose-fixed-layer" else []
    cli = EditCLI([*given, *layer, "--data.n_edits=2", f"--data.batch_size={2 if preset.startswith('emmet') else 1}"])
    assert len(cli.model.journal) == 2
    assert all(change > 0 for edit in cli.model.journal for change in edit.change.values())
    assert all(bool(torch.isfinite(weight).all()) for weight in cli.model.edited_parameters().values())


@pytest.mark.parametrize("model", MODELS)
def test_a_model_without_published_constants_composes_with_every_method(model: str) -> None:
    overlay = content(f"models/{model}")
    assert set(overlay) == {"model"}
    assert set(overlay["model"]) == {"model", "dtype"}
    assert "/" in overlay["model"]["model"]
    for method in ("mose", "memit"):
        settings, _ = composed(method, f"models/{model}.yaml")
        assert settings["model"] == overlay["model"]["model"]
        assert settings["editor"] == composed(method)[0]["editor"]


def span(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


# layers, preservation, lr, steps, weight decay, clamp, KL: the table of constants the field publishes.
COLUMNS = ("layers", "preservation", "lr", "steps", "weight_decay", "factor", "kl_factor")
PLACES = {
    "layers": "editor.layers.layers",
    "preservation": "editor.solver.preservation",
    "factor": "editor.values.constraint.factor",
} | {name: f"editor.values.{name}" for name in ("lr", "steps", "weight_decay", "kl_factor")}
PUBLISHED = {
    "gpt2-xl/rome": ([17], None, 0.5, 20, 0.5, 4, 0.0625),
    "gpt-j/rome": ([5], None, 0.5, 20, 0.5, 4, 0.0625),
    "llama2-7b/rome": ([5], None, 0.5, 25, 1e-3, 4, 0.0625),
    "llama3-8b/rome": ([5], None, 0.5, 25, 1e-3, 4, 0.0625),
    "qwen2.5-7b/rome": ([5], None, 0.5, 25, 1e-3, 4, 0.0625),
    "mistral-7b/rome": ([5], None, 0.5, 25, 1e-3, 4, 0.0625),
    "gpt2-xl/memit": (span(13, 17), 20000, 0.5, 20, 0.5, 0.75, 0.0625),
    "gpt-j/memit": (span(3, 8), 15000, 0.5, 25, 0.5, 0.75, 0.0625),
    "llama2-7b/memit": (span(4, 8), 15000, 0.5, 25, 1e-3, 4, 0.0625),
    "llama3-8b/memit": (span(4, 8), 15000, 0.1, 25, 0.5, 0.75, 0.0625),
    "qwen2.5-7b/memit": (span(4, 8), 15000, 0.5, 25, 1e-3, 4, 0.0625),
    "mistral-7b/memit": (span(4, 8), 15000, 0.5, 25, 1e-3, 4, 0.0625),
    "gpt2-xl/alphaedit": (span(13, 17), None, 0.5, 20, 0.5, 0.75, 0.0625),
    "gpt-j/alphaedit": (span(3, 8), None, 0.5, 25, 0.5, 0.75, 0.0625),
    "llama3-8b/alphaedit": (span(4, 8), None, 0.1, 25, 0.5, 0.75, 0.0625),
    "qwen2.5-7b/alphaedit": (span(4, 8), None, 0.5, 25, 1e-3, 4, 0.0625),
}
# Further constants, by dotted name.
OWN: dict[str, dict[str, Any]] = {
    "gpt2-xl/alphaedit": {"editor.solver.threshold": 0.02, "editor.solver.energy": None, "editor.solver.ridge": 10},
    "llama3-8b/alphaedit": {"editor.solver.threshold": 0.02, "editor.solver.energy": None, "editor.solver.ridge": 10},
    "qwen2.5-7b/alphaedit": {"editor.solver.threshold": 0.02, "editor.solver.energy": None, "editor.solver.ridge": 1},
    "gpt2-xl/prune": {"editor.restraints.alpha": 1.2, "editor.layers.layers": [17]},
    "llama2-7b/prune": {"editor.restraints.alpha": 1.2, "editor.layers.layers": [5]},
    "llama3-8b/prune": {"editor.restraints.alpha": 1.5, "editor.layers.layers": [5]},
    "gpt2-xl/eac-rome": {"editor.values.schedule.percentile": 85, "editor.values.schedule.l2": 0.5},
    "gpt2-xl/eac-memit": {"editor.values.schedule.percentile": 85, "editor.values.schedule.l1": 5e-7},
    "llama3-8b/eac-rome": {"editor.values.schedule.percentile": 95, "editor.values.schedule.l2": 1e-3},
    "llama3-8b/eac-memit": {"editor.values.schedule.percentile": 95, "editor.values.schedule.l1": 5e-7},
    "mistral-7b/o-edit-rome": {
        "editor.layers.layers": [8],
        "editor.values.penalties.past_weight": 50,
        "editor.values.penalties.implicit_weight": 50,
    },
    "llama3-8b/o-edit-memit": {"editor.layers.layers": [8], "editor.solver.preservation": 15000},
    "mistral-7b/o-edit-plus-rome": {"editor.layers.layers": [8], "editor.restraints.gradient_share": 2.5},
    "llama3-8b/o-edit-plus-rome": {"editor.layers.layers": [8], "editor.restraints.gradient_share": 2.5},
    "mistral-7b/o-edit-plus-memit": {"editor.restraints.gradient_share": 2, "editor.solver.preservation": 15000},
    "llama3-8b/o-edit-plus-memit": {"editor.restraints.gradient_share": 1, "editor.solver.preservation": 15000},
    "gpt2-xl/ft-l": {"editor.layers": [0], "editor.lr": 5e-4, "editor.steps": 25, "editor.norm_constraint": 5e-4},
    "llama3-8b/ft": {"editor.layers": [21], "editor.lr": 5e-4, "editor.norm_constraint": None},
    "gpt2-xl/ft-elastic-net": {"editor.elastic_net.l1": 5e-7, "editor.elastic_net.l2": 0.5},
    "llama3-8b/ft-elastic-net": {"editor.elastic_net.l1": 5e-7, "editor.elastic_net.l2": 1e-3},
    "gpt2-xl/mose-oft": {"editor.layers": span(4, 8), "editor.blocks": 4, "editor.lr": 5e-4},
    "llama3-8b/mose-oft": {"editor.layers": span(19, 21), "editor.steps": 25},
    "llama2-13b/mose-oft": {"editor.layers": span(19, 21)},
    "qwen2.5-7b/mose-oft": {"editor.layers": span(4, 6)},
    "gpt2-xl/emmet": {
        "editor.layers.layers": [17],
        "editor.solver.preservation": 1000,
        "editor.solver.ridge": 0.1,
    },
    "gpt-j/emmet": {"editor.solver.preservation": 10000, "editor.solver.ridge": 0.1},
    "llama2-7b/emmet": {"editor.solver.preservation": 1, "editor.solver.ridge": 0.1},
    "gpt2-xl/wilke": {"editor.layers.layers": span(0, 23), "editor.values.steps": 20},
    "gpt-j/wilke": {"editor.layers.layers": span(0, 6)},
    "mistral-7b/wilke": {"editor.layers.layers": span(5, 10)},
    "llama3-8b/wilke": {"editor.layers.layers": span(5, 10)},
}


@pytest.mark.parametrize("overlay", PUBLISHED)
def test_the_published_constants_are_what_is_composed(overlay: str) -> None:
    found = dict(flat(composed(overlay.split("/")[1], f"models/{overlay}")[0]))
    for name, value in zip(COLUMNS, PUBLISHED[overlay], strict=True):
        if value is not None:
            assert found[PLACES[name]] == value, name
    # As published: lr is no multiple of anything.
    assert found["editor.values.lr_unit"] == "absolute"


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if "/o-edit" in name])
def test_o_edit_has_the_constants_of_what_it_stands_on(overlay: str) -> None:
    """Only the layer and λ are its paper's own (appendix C.2)."""
    model, method = overlay.split("/")
    base = method.rsplit("-", 1)[1]
    own, its = (dict(flat(composed(name, f"models/{model}/{name}")[0]["editor"])) for name in (method, base))
    differing = {name for name in its if own.get(name) != its[name] and name.split(".")[0] != "restraints"}
    assert differing == {"layers.layers"}
    part = "restraints" if "plus" in method else "values.penalties"
    share = {"rome": 2.5, "memit": 2.0 if model == "mistral-7b" else 1.0}[base]
    assert (own[f"{part}.gradient_share"], own[f"{part}.max_directions"]) == (share, None)


@pytest.mark.parametrize("overlay", OWN)
def test_the_constants_of_a_method_of_its_own(overlay: str) -> None:
    found = dict(flat(composed(overlay.split("/")[1], f"models/{overlay}")[0]))
    assert {name: found[name] for name in OWN[overlay]} == OWN[overlay]
