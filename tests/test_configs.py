"""Every configuration makes edits on the embedded model; parts go together by YAML alone; what real models get."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.runs import command_line
from jsonargparse import ArgumentParser, Namespace
from lit_edit.callbacks import Retention
from lit_edit.configs.find import find_config, laid_over, read_config
from lit_edit.datamodules import CounterFactDataModule, EditDataModule
from torch import Tensor

from lit_edit import LitEdit, load_model
from lit_edit.cli import EditCLI, main
from lit_edit.commands.options import made
from lit_edit.editors import Editor
from lit_edit.evaluation.scores import score_targets
from lit_edit.model.prompts import Prompter
from lit_edit.settings import settings_of

Folder = Callable[[str], Path]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
METHODS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
OVERLAYS = sorted(
    path.relative_to(CONFIGS / "models").with_suffix("").as_posix() for path in CONFIGS.glob("models/*/*")
)
MODELS = sorted(path.stem for path in CONFIGS.glob("models/*.yaml"))
PRESETS = sorted(path.stem for path in CONFIGS.glob("presets/*"))
ORTHOGONAL = ("mose", "mose-key", "mose-paper", "mose-plus", "mose-oft")


def content(name: str) -> dict[str, Any]:
    return read_config(str(CONFIGS / f"{name}.yaml"))


def as_written(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


BASED = {
    name: written["base"]
    for name in sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    if "base" in (written := as_written(name))
}


# On the embedded model


EDITS = 3
# How many of them a configuration writes at least (p(target) above one half right after the edit), where not two.
WRITES = {
    "ft": 1,  # the objective asks for every token of a target at the prompt's last one
    "ft-l": 0,  # and no entry of the weight may move far
    "ft-elastic-net": 1,
    "mose-key": 1,  # a rotation brings the key's output to v* in direction, and only as far as its length reaches
    "mose": 1,
    "mose-paper": 0,  # values of any length, of which a rotation gives the direction alone
    "mend": 1,  # its network knows the unedited model, and each edit leads away from it
    "o-edit-rome": 1,  # away from what was written before, which takes from what is written
}
LOCALITY = {"mose-oft": 0.5}  # trained with no regard to anything else


@pytest.fixture(scope="module")
def untouched() -> tuple[dict[str, Tensor], list[float]]:
    """The weights of the embedded model, and what it thinks of the targets."""
    model, tokenizer = load_model()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    facts = CounterFactDataModule(n_edits=EDITS)
    facts.setup("fit")
    prompter = Prompter.of(model, tokenizer)
    rows = [prompter.row(request.prompt, request.target_new) for request in facts.requests]
    return weights, score_targets(model, prompter, rows).log_prob.exp().tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_edits_the_embedded_model(
    method: str, tmp_path: Path, untouched: tuple[dict[str, Tensor], list[float]]
) -> None:
    """As shipped, but for a smaller corpus: the edits take, and what they do not concern stays."""
    weights, chances = untouched
    cli = EditCLI(
        [
            *("fit", "--config", f"{method}.yaml", f"--data.n_edits={EDITS}", "--model.corpus_tokens=10000"),
            *("--retention.every_n=1000", "--stability.every_n=1000", "--stability.at_end=false"),
            *("--downstream.n_items=0", "--checkpoint.every_n=1000", "--export.model=false"),
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    journal = cli.model.journal
    assert [edit.number for edit in journal] == list(range(1, EDITS + 1))
    assert all(edit.layers and all(change > 0 for change in edit.change.values()) for edit in journal)
    gained = [math.log(edit.p_target / before) for edit, before in zip(journal, chances, strict=True)]
    assert sum(gained) / EDITS > 1
    assert sum(edit.p_target > 0.5 for edit in journal) >= WRITES.get(method, 2)
    (retention,) = (c for c in cli.trainer.callbacks if isinstance(c, Retention))  # type: ignore[attr-defined]
    assert retention.latest["locality"] >= LOCALITY.get(method, 0.75)
    now = cli.model.model.state_dict()
    changed = {name for name, weight in now.items() if not torch.equal(weight, weights[name])}
    assert changed
    assert changed <= set(cli.model.edited_parameters())
    for name in changed:
        assert bool(torch.isfinite(now[name]).all())
        before, after = (torch.linalg.svdvals(w[name].double()) for w in (weights, now))
        same = bool(((after - before).abs() <= 1e-5 * before).all())
        assert same == (method in ORTHOGONAL)


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
        return [
            *command_line(tiny_folder("llama"), tmp_path, method),
            *("--config", str(tmp_path / "overlay.yaml"), "--model.editor.values.steps=4", "--model.editor.contexts=1"),
            *("--export.model=false", "--trainer.enable_progress_bar=false"),
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
    given = command(method, editor)
    capsys.readouterr()  # of writing the model
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


# Variants are overlays on their base


def test_a_variant_says_only_what_it_has_of_its_own() -> None:
    """All that an overlay states differs from its base, so that a constant stands in one place."""
    assert len(BASED) > 40
    for name, base in BASED.items():
        place = f"{name.rpartition('/')[0]}/{base}".lstrip("/").removesuffix(".yaml")
        own = as_written(name)
        del own["base"]
        below = dict(flat(content(place)))
        again = {key for key, value in flat(own) if below.get(key, ...) == value}
        # A class that takes another's place has its arguments as a whole, and a source of its own is said beside.
        sources = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
        again = {k for k in again if not re.search(rf"\b{k.rpartition('.')[2]}:.*  # ", sources)}
        assert {k for k in again if "class_path" not in k and not _replaced(own, k)} == set(), name
        assert laid_over(content(place), own) == content(name)


def _replaced(own: dict[str, Any], name: str) -> bool:
    """Whether a setting, by dotted name, belongs to a class that the overlay names."""
    part: Any = own
    for key in name.split(".")[:-1]:
        part = part.get(key, part.get("init_args", {}).get(key)) if isinstance(part, dict) else None
        if isinstance(part, list) or (isinstance(part, dict) and "class_path" in part):
            return True
    return False


@pytest.mark.parametrize("name", [name for name in BASED if "/" not in name])
def test_a_base_and_its_overlay_compose_as_two_configurations_do(name: str) -> None:
    """As jsonargparse lays one ``--config`` over another, which shares no code with `read_config`."""
    own = as_written(name)
    files = []
    while base := own.pop("base", None):
        files.insert(0, own)
        own = as_written(base.removesuffix(".yaml"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(LitEdit, "model")
    parser.add_subclass_arguments(EditDataModule, "data")
    given = [part for written in (own, *files) for part in ("--config", yaml.safe_dump(written))]
    editor = made(Editor, parser.parse_args(given).as_dict()["model"]["editor"])
    assert settings_of(editor) == settings_of(composed(name)[1])


def test_an_overlay_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "first.yaml").write_text("base: o-edit-rome\nmodel: {editor: {init_args: {contexts: 2}}}")
    (tmp_path / "second.yaml").write_text("base: first.yaml\ndata: {init_args: {n_edits: 7}}")
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(tmp_path / "second.yaml"), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["n_edits"] == 7
    found = printed["model"]["editor"]["init_args"]
    assert found["contexts"] == 2
    assert found["values"]["init_args"]["penalties"][0]["class_path"] == "lit_edit.editors.values.OEdit"
    (tmp_path / "first.yaml").write_text("base: second.yaml")
    assert main(["fit", "--config", str(tmp_path / "second.yaml")]) == 2
    assert "does one name itself as `base`?" in capsys.readouterr().err
    (tmp_path / "first.yaml").write_text("base: nothing.yaml")
    assert main(["fit", "--config", str(tmp_path / "second.yaml")]) == 2
    assert "There is no configuration 'nothing.yaml'" in capsys.readouterr().err


# For real models


@cache
def composed(method: str, *overlays: str) -> tuple[dict[str, Any], Editor]:
    """The settings of ``model`` as ``fit`` composes them, and the editor made from them; no model is loaded."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(LitEdit, "model")
    parser.add_subclass_arguments(EditDataModule, "data")
    given = [part for name in (method, *overlays) for part in ("--config", yaml.safe_dump(read_config(name)))]
    settings = parser.parse_args(given).as_dict()["model"]
    return settings, made(Editor, settings["editor"])


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
        if line.startswith("#") or not value or name in ("base", "model", "dtype", "- class_path", "class_path"):
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
    "values.schedule.rule": (("weighted_gradient",), "the paper's own rule; the others are its controls"),
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
    "values.shrink": ((0,), "as published: values are not drawn back"),
    "every_key": ((False,), "as published: one key a fact"),
    "with_earlier": ((False,), "as published: a fact is written alone"),
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
    # As published: a learning rate is no multiple of anything.
    assert dict(flat(composed(overlay.split("/")[1], f"models/{overlay}")[0])).get("editor.values.lr_unit") in (
        None,
        "absolute",
    )


def test_nothing_is_excused_that_no_overlay_leaves_out() -> None:
    assert UNSAID.keys() <= {name for overlay in OVERLAYS for name in inherited(overlay)}


# Presets: where a paper and its code differ, ablations, and what a data set changes


def lines_of_use(preset: str) -> list[list[str]]:
    """The configurations of every command in a preset's header."""
    text = (CONFIGS / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
    return [re.findall(r"--config (\S+)", line) for line in text.splitlines() if line.startswith("# fit ")]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_what_it_says_and_nothing_else(preset: str) -> None:
    assert lines_of_use(preset)
    for *others, last in lines_of_use(preset):
        assert find_config(last) == find_config(f"presets/{preset}")
        before = dict(flat(composed(others[0], *others[1:])[0]["editor"]))
        after = dict(flat(composed(others[0], *others[1:], last)[0]["editor"]))
        said = dict(flat(content(f"presets/{preset}")["model"]["editor"]))
        assert {name: after[name] for name in said} == said
        part = {"mose-fixed-layer": "layers"}.get(preset, "restraints")  # a part that is put in or exchanged
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert {n for n in changed - said.keys() if n.split(".")[0] != part} == set()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_stands_in_the_card_of_every_method_it_is_for(preset: str) -> None:
    for use in lines_of_use(preset):
        card = CONFIGS.parent / "docs" / "methods" / f"{Path(use[0]).stem}.md"
        assert f"`presets/{preset}.yaml`" in card.read_text(encoding="utf-8"), card.name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_makes_edits(command: Command, preset: str) -> None:
    method = Path(lines_of_use(preset)[0][0]).stem
    given = [*command(method, "{}"), "--config", f"presets/{preset}.yaml"]
    # Nothing in the last layer, which the preset has for a deeper model, reaches a later token.
    layer = []
    if preset == "mose-fixed-layer":  # another policy, which has a layer and no steps
        given.remove("--model.editor.layers.steps=2")
        layer = ["--model.editor.layers.layers=[2]"]
    cli = EditCLI([*given, *layer, "--data.n_edits=2", f"--data.batch_size={2 if preset.startswith('emmet') else 1}"])
    assert len(cli.model.journal) == 2
    assert all(change > 0 for edit in cli.model.journal for change in edit.change.values())
    assert all(bool(torch.isfinite(weight).all()) for weight in cli.model.edited_parameters().values())


@pytest.mark.parametrize("model", MODELS)
def test_a_model_without_published_constants_composes_with_every_method(model: str) -> None:
    overlay = content(f"models/{model}")
    assert set(overlay) == {"model"}
    assert set(overlay["model"]) == {"model", "dtype", "corpus", "corpus_tokens"}
    assert "/" in overlay["model"]["model"]
    for method in ("mose", "memit"):
        settings, _ = composed(method, f"models/{model}.yaml")
        assert settings["model"] == overlay["model"]["model"]
        assert settings["editor"] == composed(method)[0]["editor"]


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if "/o-edit" in name])
def test_o_edit_has_the_constants_of_what_it_stands_on(overlay: str) -> None:
    """Only the layer and the weights of its terms are its paper's own (appendix C.2, C.3)."""
    model, method = overlay.split("/")
    base = method.rsplit("-", 1)[1]
    own, its = (dict(flat(composed(name, f"models/{model}/{name}")[0]["editor"])) for name in (method, base))
    differing = {name for name in its if own.get(name) != its[name] and name.split(".")[0] != "restraints"}
    assert differing == {"layers.layers"}
