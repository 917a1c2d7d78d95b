"""What the program says at once: help, versions, and what is mistyped, without the seconds that torch takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import REPOSITORY
from lit_edit.configs.find import check_order

import lit_edit
from lit_edit import __version__, cli, start
from lit_edit.cli import _Unstarted
from lit_edit.spelling import check_options, closest, fit_options

LOADED = ("torch", "lightning", "transformers", "jsonargparse", "rich")
Said = pytest.CaptureFixture[str]


AT_ONCE: list[tuple[list[str], str]] = [
    (["--help"], "usage: "),
    ([], "usage: "),
    (["--version"], f"lit-edit {__version__}\n"),
    (["fit", "--help"], "--data.path FILE"),
    (["fit", "--config=nothing.yaml"], "There is no configuration 'nothing.yaml'"),
    (["fit", "--config", "mosee"], "(did you mean mose?)"),
    (["statistics", "-c", "memitt.yaml"], "(did you mean memit?)"),
    (["fitt"], "There is no command 'fitt' (did you mean fit?)."),
    (["fit", "--modell.dtype=float32"], "There is no option --modell.dtype (did you mean --model.dtype?)."),
    (["fit", "--n_edits", "3"], "There is no option --n_edits (did you mean --data.n_edits?)."),
    (["fit", "--trainer.precission=16"], "(did you mean --trainer.precision?)"),
    (["fit", "--retention.everyn", "5"], "(did you mean --retention.every_n?)"),
    (["fit", "--model.corpustokens=5"], "(did you mean --model.corpus_tokens?)"),
    (["fit", "--optimizer=Adam"], "--optimizer: edits have no optimiser of Lightning's."),
    (["fit", "--config=memit.yaml", "--data.path=nowhere.csv"], "nowhere.csv: there is no such file."),
    (
        ["fit", "--config=models/gpt2-xl/memit.yaml"],
        "name the method before it, as in --config memit.yaml --config models/gpt2-xl/memit.yaml.",
    ),
    (
        ["fit", "--config=presets/rect-as-released", "--config=rect"],
        "presets/rect-as-released changes settings of a method and stands before rect",
    ),
]


@pytest.mark.parametrize(("given", "said"), AT_ONCE)
def test_what_is_said_at_once(given: list[str], said: str, capsys: Said) -> None:
    status = start.main(given)
    found = capsys.readouterr()
    if status == 0:
        assert said in found.out
        assert found.err == ""
    else:
        assert status == 2
        assert said in found.err
        assert (len(found.err.splitlines()), found.out) == (1, "")


def test_it_takes_no_seconds() -> None:
    """Of all that takes long to load, nothing is loaded for it."""
    program = (
        "import json, sys; from lit_edit.start import main; [main(given) for given in json.loads(sys.argv[1])]; "
        f"loaded = set(sys.modules) & {set(LOADED)!r}; sys.exit(str(loaded) if loaded else 0)"
    )
    cases = json.dumps([given for given, _ in AT_ONCE])
    done = subprocess.run([sys.executable, "-c", program, cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_help_fits_on_a_screen(capsys: Said) -> None:
    for given in ([], ["fit", "--help"]):
        assert start.main(given) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 120
    options = re.findall(r"^ +(?:-c, )?(--[\w.]+) ", "\n".join(lines), re.MULTILINE)
    assert len([option for option in options if "help" not in option]) == 10
    check_options(options)


def test_every_command_is_in_the_overview() -> None:
    assert set(start.COMMANDS) == {"fit", "completion", *cli._COMMANDS}


def test_all_options_are_a_word_away(capsys: Said) -> None:
    with pytest.raises(SystemExit) as end:
        start.main(["fit", "--help.all"])
    assert end.value.code == 0
    assert "--stability.every_n" in capsys.readouterr().out


def test_the_sources_tell_the_options_that_the_parser_has() -> None:
    """All of them and no other, where they tell any."""
    made = _Unstarted(["fit", "--config", "rome.yaml"])
    parser = made.parser._subcommands_action.choices["fit"]
    real = {
        option[2:]
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and not option.endswith(("+", ".help"))
    }
    check_options([f"--{name}" for name in real])
    known = fit_options()
    told = {f"{group}.{name}" for group, names in known.items() for name in names or ()}
    assert {name for name in real if name.split(".")[0] in known and known[name.split(".")[0]] and "." in name} == told
    assert len(told) > 60
    assert {name for name in known if name not in real} == {"help.all"}


def test_overlays_in_order_are_let_pass() -> None:
    check_order(["rect.yaml", "models/gpt2-xl/rect.yaml", "presets/rect-as-released.yaml"])
    check_order(["models/gpt2-xl.yaml", "rome.yaml"])  # says nothing of the method


def test_the_closest_name_has_upper_case_aside() -> None:
    assert closest("memit", ["ROME", "MEMIT"]) == "MEMIT"
    assert closest("xyz", ["ROME", "MEMIT"]) is None


def test_the_package_loads_nothing_before_it_is_asked() -> None:
    program = (
        "import sys, lit_edit; assert 'torch' not in sys.modules; lit_edit.Session; assert 'torch' in sys.modules; "
        "lit_edit.statistics.cache_folder; "
        "assert all(hasattr(lit_edit, name) for name in lit_edit.__all__); print(sorted(dir(lit_edit))[:3])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'sesion'"):
        lit_edit.sesion  # noqa: B018


def test_the_program_starts_here() -> None:
    for file in ("train.py", "lit_edit/__main__.py"):
        assert "from lit_edit.start import main" in Path(REPOSITORY, file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        (["me"], []),
        (["comp"], ["compare", "completion"]),
        (["fit", "--config", "memit-"], ["memit-plus"]),
        (["fit", "--config", "=", "models/llama3-8b/eac-r"], ["models/llama3-8b/eac-rome"]),
        (["fit", "--retention.ev"], ["--retention.every_n"]),
        (["fit", "--data", "Zs"], ["ZsREDataModule"]),
        (["ask", "--run", "las"], ["last"]),
    ],
)
def test_what_a_shell_proposes(words: list[str], proposed: list[str], tmp_path: Path, capsys: Said) -> None:
    assert start.main(["completion", "bash"]) == 0
    made = capsys.readouterr().out
    line = " ".join(f"'{word}'" for word in ["lit-edit", *words])
    asking = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _lit_edit; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        ["bash", "-c", f"{made}\n{asking}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.split() == proposed


def test_completion_for_other_shells(capsys: Said) -> None:
    assert start.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit && bashcompinit\n")
    assert start.main(["completion", "fish"]) == 2
