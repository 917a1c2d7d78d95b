"""Commands: functions whose signature gives their options and whose docstring the help, or parsers of their own."""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from lit_edit.commands.messages import readable
from lit_edit.program import program


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of description and examples as they are."""


def call(command: Callable[..., int], name: str, args: Sequence[str], examples: str = "") -> int:
    """Runs a command with the options of a command line.

    A parameter is an option of its name, a positional-only one a positional argument, a list takes several words, and
    ``*others`` takes whatever else there is. What `functools.partial` has filled in is no option.

    Args:
        command: A typed function whose docstring describes its parameters.
        name: Name of the command.
        args: The words after the name.
        examples: Shown at the end of ``--help``.

    Returns:
        What the command returns, an exit status.

    Raises:
        ValueError: If the words do not fit.
    """
    filled = command.keywords if isinstance(command, functools.partial) else {}
    function = command.func if isinstance(command, functools.partial) else command
    said = docstring_parser.parse(function.__doc__ or "")
    helps = {parameter.arg_name: parameter.description for parameter in said.params}
    parser = ArgumentParser(
        prog=f"{program()} {name}",
        description=as_called(said.description or ""),
        epilog=as_called(examples),
        formatter_class=_Help,
        exit_on_error=False,
    )
    hints = get_type_hints(function)
    parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n not in filled}
    rest = next((n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
    words: list[str] = list(args)
    others: list[str] = []
    if rest is not None:
        del parameters[rest]
        words, others = _split(args, set(parameters))
    for key, parameter in parameters.items():
        hint, default, positional = hints[key], parameter.default, parameter.kind is parameter.POSITIONAL_ONLY
        needed = default is parameter.empty
        how: dict[str, Any] = {"help": helps.get(key)}
        if not needed:
            how["default"] = list(default) if isinstance(default, tuple) else default
        if hint is bool:
            how["action"] = "store_true"
        elif item := _item(hint):
            how |= {"nargs": "+" if needed or not positional else "*", "type": item}
        else:
            how["type"] = hint
        if needed and not positional:
            how["required"] = True
        parser.add_argument(key if positional else f"--{key}", **how)
    try:
        given = parser.parse_args(words).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{name}: {readable(str(error))}") from error
    first = [given.pop(key) for key, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    return command(*first, *others, **given)


def summary(command: Callable[..., int]) -> str:
    """A line for the list of commands."""
    return str(command.__doc__).splitlines()[0]


class Parser(argparse.ArgumentParser):
    """Options written out one by one; what is wrong is an exception, so that it ends like the errors of ``fit``."""

    def __init__(self, command: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"{program()} {command}",
            description=as_called(description),
            epilog=as_called(epilog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.command = command

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"{self.command}: {message}")


def _item(hint: Any) -> Any:
    """The type of the items of a list, also of one that may be None; None for other types."""
    lists = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is list]
    return get_args(lists[0])[0] if lists else None


def _split(args: Sequence[str], own: set[str]) -> tuple[list[str], list[str]]:
    """The words of some options, with the values that follow them, and all others."""
    mine: list[str] = []
    others: list[str] = []
    owner = others
    for word in args:
        if word.startswith("-") and not word[1:].isdigit():
            owner = mine if word.split("=", 1)[0].removeprefix("--") in own or word in ("-h", "--help") else others
        owner.append(word)
    return mine, others


def as_called(text: str) -> str:
    """A text for people with the program named as the user called it."""
    return text.replace("python train.py", program())


def made(kind: Any, section: Mapping[str, Any]) -> Any:
    """The object that a section of a configuration describes by ``class_path`` and ``init_args``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    return parser.instantiate(parser.parse_object({"part": dict(section)})).part
