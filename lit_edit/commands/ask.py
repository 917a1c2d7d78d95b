"""``python train.py ask``: what a model answers before and after its edits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lit_edit.commands.conversation import converse
from lit_edit.commands.edited_run import EditedRun
from lit_edit.commands.options import Parser
from lit_edit.datamodules import FactsDataModule
from lit_edit.datamodules.base import OnBadRecord
from lit_edit.evaluation.scores import greedy, score_targets
from lit_edit.model.loading import EMBEDDED, load_model
from lit_edit.model.prompts import Prompter
from lit_edit.requests import EditRequest, RequestError

SUMMARY = "Ask the model before and after its edits, and show which facts hold."

_DESCRIPTION = """\
Asks the original and the edited model the same, greedily, and shows both answers. Without prompts and facts they are
asked for at the terminal, or read from standard input, one a line."""

_EPILOG = """\
With --facts every fact of a file is asked and judged as `fit` judges it: it holds if every token of the new answer is
the most likely one.

  python train.py ask --run runs/mose/version_0 "The capital of France is"
  python train.py ask --run runs/mose/version_0 --facts facts.csv --json
  python train.py ask --run last
  python train.py ask --model edited-model --original embedded < prompts.txt"""


_MORE = 3  # tokens of an answer beyond those of the answer wanted: other words may be cut into more


@dataclass
class Answers:
    """What one model answers: a text for each prompt and fact, and whether each fact holds."""

    prompts: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    holds: list[bool] = field(default_factory=list)


def answer(
    model: nn.Module, prompter: Prompter, prompts: Sequence[str], facts: Sequence[EditRequest], max_new_tokens: int
) -> Answers:
    """Asks a model, greedily; about a fact a few tokens more than its new answer has.

    Raises:
        ValueError: if a prompt does not fit the model.
    """
    said = Answers()
    decode = prompter.tokenizer.decode
    room = [prompter.max_length - len(prompter.row(prompt).ids) for prompt in prompts]
    lengths = [max(0, min(max_new_tokens, left)) for left in room]
    said.prompts = [decode(ids).strip() for ids in greedy(model, prompter, prompts, lengths)]
    if facts:
        rows = [prompter.row(fact.prompt, fact.target_new, source=fact.source) for fact in facts]
        asked = [fact.prompt for fact in facts]
        long = [min(len(row.ids) - row.target_start + _MORE, prompter.max_length - row.target_start) for row in rows]
        said.facts = [decode(ids).strip() for ids in greedy(model, prompter, asked, long)]
        said.holds = score_targets(model, prompter, rows).exact.tolist()
    return said


def prompts_table(prompts: Sequence[str], before: Answers, after: Answers) -> Table:
    """Prompts with both answers; line breaks within an answer are shown as such."""
    table = Table("prompt", "before", "after", show_lines=False)
    for prompt, one, other in zip(prompts, before.prompts, after.prompts, strict=True):
        table.add_row(*map(_cell, (prompt, one, other)))
    return table


def facts_table(facts: Sequence[EditRequest], before: Answers, after: Answers) -> Table:
    """Facts with both answers, what was wanted, and whether it holds; the caption counts."""
    n, held = len(facts), sum(after.holds)
    table = Table(
        title=f"{held} of {n} facts hold; {sum(before.holds)} held before the edits",
        title_justify="left",
    )
    for name in ("case", "prompt", "wanted", "before", "after", "holds"):
        table.add_column(name, overflow="fold")
    for i, fact in enumerate(facts):
        holds = ("yes" if after.holds[i] else "no") + (" (as before)" if after.holds[i] and before.holds[i] else "")
        cells = (fact.case_id, fact.prompt, fact.target_new, before.facts[i], after.facts[i], holds)
        table.add_row(*map(_cell, cells))
    return table


def _cell(text: str) -> Text:
    """As it is, brackets in it being no markup; what cannot be seen as Python writes it."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def as_json(
    prompts: Sequence[str], facts: Sequence[EditRequest], before: Answers, after: Answers
) -> dict[str, list[dict[str, Any]]]:
    """What was asked, and both answers, in the types of JSON."""
    rows = zip(facts, before.facts, after.facts, before.holds, after.holds, strict=True)
    return {
        "prompts": [
            {"prompt": prompt, "before": one, "after": other}
            for prompt, one, other in zip(prompts, before.prompts, after.prompts, strict=True)
        ],
        "facts": [
            {
                **{"case_id": fact.case_id, "prompt": fact.prompt, "subject": fact.subject},
                **{"target_new": fact.target_new, "before": one, "after": other, "held_before": held, "holds": holds},
            }
            for fact, one, other, held, holds in rows
        ],
    }


def both_of(models: Sequence[tuple[nn.Module, Prompter]], max_new_tokens: int) -> Callable[[str], tuple[str, str]]:
    """Asks two models for one prompt, as often as need be."""

    def asked(prompt: str) -> tuple[str, str]:
        before, after = (answer(m, prompter, [prompt], [], max_new_tokens).prompts[0] for m, prompter in models)
        return before, after

    return asked


def both_of_run(edited: EditedRun, device: str, max_new_tokens: int) -> Callable[[str], tuple[str, str]]:
    """Asks the model before and after a run's edits, of which only the edited weights are in memory twice."""
    model, tokenizer = edited.load()
    model.to(device)
    prompter = Prompter.of(model, tokenizer, edited.chat_template)
    original = edited.apply(model).originals
    now = {name: model.get_parameter(name).detach().clone() for name in original}

    def put(weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            model.get_parameter(name).detach().copy_(weight)

    def asked(prompt: str) -> tuple[str, str]:
        try:
            put(original)
            before = answer(model, prompter, [prompt], [], max_new_tokens).prompts[0]
        finally:
            put(now)
        return before, answer(model, prompter, [prompt], [], max_new_tokens).prompts[0]

    return asked


def parser() -> Parser:
    """The options of ``ask``."""
    options = Parser("ask", _DESCRIPTION, _EPILOG)
    options.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to ask")
    options.add_argument("--run", type=Path, metavar="FOLDER", help="the run whose edits to look at")
    options.add_argument("--ckpt_path", type=Path, metavar="FILE", help="a checkpoint other than the run's own")
    options.add_argument("--model", metavar="MODEL", help="an edited model, instead of a run: a folder or a hub name")
    options.add_argument(
        "--original", metavar="MODEL", help="the unedited model (default: the run's; with --model, the embedded one)"
    )
    options.add_argument("--dtype", default="float32", help="of --model and its original (default: %(default)s)")
    options.add_argument(
        "--chat_template",
        action="store_true",
        help="put prompts into the chat template of --model; with --run, they are if they were in the run",
    )
    options.add_argument("--facts", type=Path, metavar="FILE", help="facts to ask for: a file as FactsDataModule reads")
    options.add_argument(
        "--on_bad_record",
        choices=("raise", "skip"),
        help="what to do with facts of the file that cannot be edited: skip leaves them out and says so (default: what "
        "the run did; raise with --model)",
    )
    options.add_argument(
        "--max_new_tokens", type=int, default=12, help="length of the answers to prompts (default: %(default)s)"
    )
    options.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    options.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return options


def _facts(path: Path | None, on_bad_record: OnBadRecord) -> list[EditRequest]:
    """The facts of a file; none without one.

    Raises:
        lit_edit.requests.RequestError: as `FactsDataModule` says, with the options of this command.
    """
    if path is None:
        return []
    data = FactsDataModule(str(path), on_bad_record=on_bad_record)
    try:
        data.setup("fit")
    except RequestError as error:
        raise RequestError(str(error).replace("--data.on_bad_record", "--on_bad_record")) from None
    return data.requests


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"ask: there is no device {name!r} here.") from error


def main(args: Sequence[str] | None = None) -> int:
    """Asks both models, one after the other, and prints what they say. Returns 0.

    Args:
        args: the options, without the word ``ask``; those of the process after it if None.

    Raises:
        ValueError: if there is nothing to ask, or nobody to be asked.
    """
    given = parser().parse_args(list(sys.argv[2:] if args is None else args))
    run = given.run is not None or given.ckpt_path is not None
    if run == (given.model is not None):
        raise ValueError("ask: which model? Either --run last (or the folder of a run) or --model edited-model.")
    if given.max_new_tokens < 1:
        raise ValueError(f"ask: --max_new_tokens is {given.max_new_tokens}; it must be at least 1.")
    edited = EditedRun.find(given.run, given.ckpt_path, given.original) if run else None
    facts = _facts(given.facts, given.on_bad_record or (edited.on_bad_record if edited else "raise"))
    prompts = [prompt for prompt in given.prompts if prompt.strip()]
    talk = not prompts and not facts and sys.stdin.isatty()
    if not prompts and not facts and not talk:
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts and not facts and not talk:
        raise ValueError("ask: nothing is asked: give prompts, --facts, or lines on standard input.")

    _check_device(given.device)

    console = Console(highlight=False)

    def asked(model: nn.Module, prompter: Prompter) -> Answers:
        return answer(model, prompter, prompts, facts, given.max_new_tokens)

    if talk and edited is not None:
        converse(both_of_run(edited, given.device, given.max_new_tokens), console)
        return 0
    if talk:
        loaded = [load_model(name, given.dtype, given.device) for name in (given.original or EMBEDDED, given.model)]
        both = [(one.eval(), Prompter.of(one, words, given.chat_template)) for one, words in loaded]
        converse(both_of(both, given.max_new_tokens), console)
        return 0

    if edited is not None:
        model, tokenizer = edited.load()
        model.to(given.device)
        prompter = Prompter.of(model, tokenizer, edited.chat_template)
        before = asked(model, prompter)
        edited.apply(model)
        after = asked(model, prompter)
    else:
        answers = []
        for name in (given.original or EMBEDDED, given.model):
            model, tokenizer = load_model(name, given.dtype, given.device)
            answers.append(asked(model.eval(), Prompter.of(model, tokenizer, given.chat_template)))
            del model  # there need not be room for both
        before, after = answers
    if given.json:
        print(json.dumps(as_json(prompts, facts, before, after), indent=2, ensure_ascii=False))
        return 0
    if prompts:
        console.print(prompts_table(prompts, before, after))
    if facts:
        console.print(facts_table(facts, before, after))
    return 0
