"""``ask`` at a terminal: a prompt that shows itself, with history and help."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from rich.console import Console
from rich.text import Text

HELP = """\
Write the beginning of a sentence, as in `The capital of France is`: both models go on with it, greedily.
  arrow up    what was asked before      help    this      quit, Ctrl-D    the end"""
_PROMPT = "ask> "


def converse(both: Callable[[str], tuple[str, str]], console: Console, read: Callable[[str], str] | None = None) -> int:
    """Asks for prompts and shows both answers until the user has enough.

    Args:
        both: What the models before and after the edits say to a prompt.
        console: Where to show it.
        read: Reads a line; `input` if None, with history where Python has readline.

    Returns:
        Number of prompts that were asked.
    """
    with suppress(ImportError):  # on Windows
        import readline  # noqa: F401 - `input` takes its history from it
    read = read or input
    console.print(HELP, markup=False)
    asked = 0
    while True:
        try:
            prompt = read(_PROMPT).rstrip("\n")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return asked
        word = prompt.strip().lower()
        if word in ("quit", "exit"):
            return asked
        if word in ("help", "?"):
            console.print(HELP, markup=False)
        elif word:
            try:
                before, after = both(prompt)
            except ValueError as error:  # a prompt that is too long is no reason to load the models again
                console.print(Text(str(error)))
                continue
            asked += 1
            console.print(Text(f"  before  {before}\n  after   {after}"))
