"""Names that were mistyped, and those that were probably meant.

The options of ``fit`` are read from the sources: importing torch and Lightning to know them takes seconds. What the
sources do not say plainly is taken as right here; the parser itself comes later and knows.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from lit_edit.program import program

Names = frozenset[str]
_FLAT = ("config", "help", "help.all", "print_config", "seed_everything", "ckpt_path", "weights_only")
_GROUPS = ("model", "data", "trainer")
_NO_OPTIMIZER = ("optimizer", "lr_scheduler")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` for the closest of the known names, or nothing.

    Args:
        name: As it was typed.
        known: What there is.
    """
    found = closest(name, known)
    return f" (did you mean {found}?)" if found else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that one was probably meant to be, upper and lower case aside; None if there is none."""
    folded = {one.casefold(): one for one in sorted(known, reverse=True)}
    found = difflib.get_close_matches(name.casefold(), list(folded), 1, cutoff=0.7)
    return folded[found[0]] if found else None


def unknown_option(name: str) -> str:
    """What is said about an option of ``fit`` that does not exist.

    Args:
        name: Without its dashes and value.
    """
    first = name.split(".")[0]
    if first in _NO_OPTIMIZER:
        return (
            f"--{first}: edits have no optimiser of Lightning's. The step size and number of steps of a method are "
            "--model.editor.values.lr and --model.editor.values.steps."
        )
    options = fit_options()
    known = [*(n for n, below in options.items() if below is None and n not in _GROUPS), *_GROUPS]
    known += [f"{group}.{below}" for group, names in options.items() for below in names or ()]
    known += [f"data.{below}" for below in _arguments(_folder("lit_edit.datamodules"), "EditDataModule") or ()]
    last = name.rsplit(".", 1)[-1]
    same = sorted(one for one in known if one.rsplit(".", 1)[-1] == last)
    meant = same[0] if same and "." not in name else closest(name, known)
    hint = f" (did you mean --{meant}?)" if meant else ""
    return f"There is no option --{name}{hint}. `{program()} fit --help` has the usual ones, `fit --help.all` all."


def check_options(args: Iterable[str]) -> None:
    """Refuses options of ``fit`` that do not exist, as far as the sources tell.

    Args:
        args: What stands behind ``fit``.

    Raises:
        ValueError: Naming the option, and the one that was probably meant.
    """
    options: dict[str, Names | None] | None = None
    for arg in args:
        if not re.match(r"--[a-zA-Z]", arg):
            continue
        name = arg[2:].split("=", 1)[0].removesuffix("+")
        options = fit_options() if options is None else options
        group, _, rest = name.partition(".")
        if name in options or rest == "help":
            continue
        known = options.get(group)
        if group in options and (known is None or rest.split(".")[0].removesuffix("+") in known):
            continue
        raise ValueError(unknown_option(name))


def fit_options() -> dict[str, Names | None]:
    """The options of ``fit`` by their first name, and the second ones; None where any or none may follow."""
    found: dict[str, Names | None] = dict.fromkeys([*_FLAT, *_GROUPS])
    own = Path(__file__).parent
    tree = ast.parse((own / "cli.py").read_text(encoding="utf-8"))
    texts = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    adding = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "add_arguments_to_parser")
    for call in (node for node in ast.walk(adding) if isinstance(node, ast.Call)):
        how = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        named = [texts.get(a.id, a.id) if isinstance(a, ast.Name) else getattr(a, "value", None) for a in call.args]
        if how == "add_argument":
            found |= {str(name).lstrip("-"): None for name in named}
        elif how == "add_lightning_class_args" and len(named) == 2:
            found[str(named[1])] = _arguments(_folder("lit_edit.callbacks"), str(named[0]))
    model = _arguments(own / "module.py", "LitEdit", also=("preparation",))
    prepared = _fields(own / "session.py", "Preparation")
    if model is not None and prepared:
        found["model"] = (model | prepared) - {"tokenizer", "preparation"}
    lightning = _folder("lightning")
    found["trainer"] = _arguments(lightning / "pytorch" / "trainer" / "trainer.py", "Trainer") if lightning else None
    return found


def _folder(package: str) -> Path | None:
    """Where a package lies, without importing more of it than what is around it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _class(place: Path | None, name: str) -> ast.ClassDef | None:
    """A class in a file, or in one of the files of a folder."""
    if place is None or not place.exists():
        return None
    for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
        text = file.read_text(encoding="utf-8")
        if re.search(rf"^class {re.escape(name)}\b", text, re.MULTILINE):
            body = ast.parse(text).body
            return next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)
    return None


def _arguments(place: Path | None, name: str, also: Collection[str] = ()) -> Names | None:
    """The arguments of a class, its base's if it has none of its own; None if they cannot be told.

    Args:
        place: The file, or the folder of files.
        name: Of the class.
        also: Names that ``**name`` may have, which then counts as an argument.
    """
    found = _class(place, name)
    if found is None:
        return None
    init = next((n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        bases = [base.id for base in found.bases if isinstance(base, ast.Name)]
        return _arguments(place, bases[0]) if bases else None
    if init.args.vararg or (init.args.kwarg and init.args.kwarg.arg not in also):
        return None
    return frozenset(arg.arg for arg in (*init.args.args[1:], *init.args.kwonlyargs))


def _fields(place: Path, name: str) -> Names | None:
    """The fields of a dataclass."""
    found = _class(place, name)
    if found is None:
        return None
    fields = [node.target for node in found.body if isinstance(node, ast.AnnAssign)]
    return frozenset(target.id for target in fields if isinstance(target, ast.Name))
