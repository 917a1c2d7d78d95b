"""What commands share: options whose errors end in one line, and parts of a configuration as `fit` makes them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lit_edit.program import program


class Parser(argparse.ArgumentParser):
    """Says what is wrong as an exception, so that it ends like the errors of ``fit``."""

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


def as_called(text: str) -> str:
    """A text for people with the program named as the user called it."""
    return text.replace("python train.py", program())


def made(kind: Any, section: Mapping[str, Any]) -> Any:
    """The object that a section of a configuration describes by ``class_path`` and ``init_args``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind)
    return parser.instantiate(parser.parse_object({"part": dict(section)})).part
