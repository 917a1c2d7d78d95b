"""``fit --dry_run``: what a run would do, need and take. Nothing is written, and nothing that is edited is kept.

Memory is estimated before the model is loaded, from its configuration. Time is measured: the first batches are planned
and applied to the loaded model, in memory; the process ends afterwards.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lit_edit.callbacks import Retention
from lit_edit.commands.estimate import (
    Memory,
    Time,
    editing_time,
    memory_needed,
    questions_asked,
    size_text,
    time_text,
)
from lit_edit.commands.options import made
from lit_edit.commands.review import review, review_table
from lit_edit.datamodules import EditDataModule
from lit_edit.editors import Editor
from lit_edit.evaluation.scores import LocalityReference, evaluate
from lit_edit.model.families import FAMILIES, Family
from lit_edit.model.loading import DTYPES, EMBEDDED, LoadingError, embedded_path, refuse_quantised
from lit_edit.model.prompts import check_requests
from lit_edit.model.workspace import Workspace
from lit_edit.module import LitEdit
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession, cache_folder, statistics_of
from lit_edit.statistics import GRADIENTS, KEY_COVARIANCES, Statistics, sequences_of
from lit_edit.statistics.corpora import Corpus, load_corpus
from lit_edit.statistics.covariance import warn_if_few

SAMPLED_TOKENS = 2048  # of the corpus, where its statistics are not there yet
LONG = 60.0  # seconds of a batch after which no second one is rehearsed
ASKED = 8  # requests that the time of an evaluation is taken from
# Of the control group that a process runs in: the most it may take, what it has taken, and what of that is files that
# were read, which give way to whatever needs the room; of version 2, then of 1.
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)
_RIDGE = 1e-6  # of the mean eigenvalue: makes covariances of a sample invertible, as those of the whole corpus are


@dataclass(frozen=True)
class Foreseen:
    """What was found before the model was loaded: the need, and the memory that was at hand then (None: not known)."""

    memory: Memory
    at_hand: int | None
    place: str


def foresee(config: Mapping[str, Any], console: Console) -> Foreseen | None:
    """Estimates and prints the memory of a run from its settings, without loading the model.

    Args:
        config: the settings of ``fit``: ``model``, ``data``, ``trainer``, and of callbacks that compare weights with
            the original ones, ``stability`` and ``export``.
        console: where to print.

    Returns:
        None where the model's configuration does not tell; loading it will say why.

    Raises:
        ValueError: if what lasts does not fit into the memory at hand, or settings or data are wrong.
    """
    model, data = config["model"], made(EditDataModule, config["data"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the run's own data module says the same
        data.setup("fit")
    family = model.get("family")
    found = skeleton(model["model"], model["dtype"])
    if found is None:
        return None
    net, tokenizer = found
    if family is None and net.config.model_type not in FAMILIES:
        return None
    known = None if family is None else Family(**family)
    workspace = Workspace.of(net, tokenizer, family=known, chat_template=bool(model.get("chat_template")))
    check_requests(data.requests, workspace.prompter)
    device = _device(str((config.get("trainer") or {}).get("accelerator") or "auto"))
    need = memory_needed(
        workspace,
        made(Editor, model["editor"]),
        data.requests,
        data.batch_size,
        on_gpu=device.type == "cuda",
    )
    foreseen = Foreseen(need, memory_at_hand(device), "GPU memory" if device.type == "cuda" else "memory")
    console.print(memory_table(foreseen))
    console.print()
    if foreseen.at_hand is not None and need.kept > foreseen.at_hand:
        raise ValueError(
            f"{model['model']!r} needs {size_text(need.kept)} for what lasts alone, {size_text(foreseen.at_hand)} of "
            f"{foreseen.place} are at hand: take --model.dtype=bfloat16, fewer layers, or a larger machine."
        )
    return foreseen


def skeleton(name: str, dtype: str) -> tuple[Any, Any] | None:
    """A model whose weights have shapes and dtypes but take no memory, and its tokenizer; None if there is none."""
    where = str(embedded_path("model")) if name == EMBEDDED else str(Path(name).expanduser())
    if dtype not in DTYPES:
        return None
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        refuse_quantised(name, config)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False)
    except LoadingError:
        raise
    except (OSError, ValueError, KeyError, ImportError):
        return None
    hollow: dict[int, nn.Parameter] = {}  # a tied weight stays one
    for module in model.modules():
        for own, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(weight) not in hollow:
                zeros = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                hollow[id(weight)] = nn.Parameter(zeros, requires_grad=False)
            setattr(module, own, hollow[id(weight)])
    return model, tokenizer


def _device(accelerator: str) -> torch.device:
    """Where a run of this accelerator computes."""
    return torch.device("cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")


def memory_at_hand(device: torch.device) -> int | None:
    """Bytes that a process can still take, within the limits of its control group; None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for folder, limit, used, files in _GROUPS:
        both = [*_lines(Path(folder, limit)), *_lines(Path(folder, used))]
        if len(both) == 2 and both[0].isdigit() and both[1].isdigit():
            kinds = dict(line.split() for line in _lines(Path(folder, "memory.stat")))
            found.append(int(both[0]) - int(both[1]) + sum(int(kinds.get(kind, 0)) for kind in files))
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system, or not ours to read
        return []


def memory_table(foreseen: Foreseen) -> Table:
    """What memory is needed for, the largest first."""
    memory = foreseen.memory
    table = Table("memory for", "about", title="Memory, from the model's configuration", title_justify="left")
    table.columns[1].justify = "right"
    for what, size in sorted(memory.lasting.items(), key=lambda item: -item[1]):
        table.add_row(what, size_text(size))
    if memory.passing:
        what = max(memory.passing, key=lambda name: memory.passing[name])
        table.add_row(f"at its highest, while {what}", size_text(memory.passing[what]))
    table.add_row("together", size_text(memory.total), style="bold")
    if foreseen.at_hand is not None:
        table.add_row(f"{foreseen.place} at hand", size_text(foreseen.at_hand))
    return table


def rehearse(
    module: LitEdit,
    data: EditDataModule,
    retention: Retention | None,
    device: torch.device,
    foreseen: Foreseen | None,
    console: Console,
) -> Time:
    """Prints the review of the facts and how long the run would take, by what its first batches take.

    Args:
        module: edited in memory by this; not to be used afterwards.
        data: the facts.
        retention: evaluates along the run; None if nothing does.
        device: where to compute.
        foreseen: what `foresee` found.
        console: where to print.

    Raises:
        ValueError: for everything that would end the run before its first edit, and at the first if the corpus has too
            few tokens for the method.
    """
    data.setup("fit")
    requests, size = data.requests, data.batch_size
    check_requests(requests, module.prompter)
    model = module.model.to(device)
    console.print(review_table(review(requests, model, module.prompter)))
    console.print()
    session, preparing = _prepared(module, requests, size)
    measuring = {} if retention is None else _measured(session, requests, size, retention)
    stages = [_batch(session, requests[:size])]
    if len(requests) > size and sum(stages[0].values()) * size < LONG:
        stages.append(_batch(session, requests[size : 2 * size]))
    found = Time(preparing, editing_time(stages[0], stages[-1], len(requests), size), measuring)
    console.print(time_table(found, stages[-1], len(requests)))
    console.print(
        f"{len(requests)} edits would take about {time_text(found.total)}, general abilities and figures of matrices "
        f"not counted{_need(foreseen)}. The rehearsal took {size_text(_peak(device))} of memory at its "
        "highest, the program included. Nothing was written.",
        highlight=False,
    )
    return found


def _need(foreseen: Foreseen | None) -> str:
    if foreseen is None:
        return ""
    need = f", and need about {size_text(foreseen.memory.total)}"
    if foreseen.at_hand is None:
        return need
    tight = ", which may not be enough" if foreseen.memory.total > foreseen.at_hand else ""
    return f"{need} of the {size_text(foreseen.at_hand)} of {foreseen.place} at hand{tight}"


def _prepared(
    module: LitEdit, requests: Sequence[EditRequest], batch_size: int
) -> tuple[EditSession, dict[str, float]]:
    """A session as the run would have it, and the seconds until its first edit.

    Statistics that are not there yet are taken over a few tokens only, and their time is scaled to the tokens asked
    for. They are good enough to see how long an edit takes, not for the edit itself. Covariances that will be singular
    are left so: methods that invert them refuse them here as they would in the run.

    Raises:
        ValueError: as the session says; or if statistics are missing and may not be collected.
    """
    corpus = load_corpus(module.corpus)
    cache = cache_folder() if module.cache_dir is None else Path(module.cache_dir)
    missing = _missing(module, corpus, cache)
    if missing and not module.collect_statistics:
        missing[0].get(may_collect=False)
    with tempfile.TemporaryDirectory() as nowhere, warnings.catch_warnings():
        if missing:
            warnings.simplefilter("ignore", UserWarning)  # that the tokens are few
        session = EditSession(
            module.model,
            module.tokenizer,
            module.editor,
            corpus=corpus,
            corpus_name=module.corpus,
            corpus_tokens=min(module.corpus_tokens, SAMPLED_TOKENS) if missing else module.corpus_tokens,
            cache_dir=nowhere if missing else cache,
            seed=module.context_seed,
            family=module.family,
            chat_template=module.chat_template,
            requests=requests,
        )
    preparing = dict(session.prepared)
    if missing:
        length = min(256, session.workspace.prompter.max_length)
        wanted = _tokens(module.tokenizer, corpus, module.corpus_tokens, length)
        preparing["statistics"] *= max(1.0, wanted / min(wanted, SAMPLED_TOKENS))
        covariances = {site.name: site.covariance for site in session.sites if site.covariance is not None}
        warn_if_few({name: len(covariance) for name, covariance in covariances.items()}, wanted, stacklevel=2)
        for covariance in covariances.values():
            if wanted > max(SAMPLED_TOKENS, len(covariance)):
                covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean())
    began = time.perf_counter()
    session.check(requests, batch_size)
    preparing["checks"] = time.perf_counter() - began
    return session, preparing


def _missing(module: LitEdit, corpus: Corpus, cache: Path) -> list[Statistics]:
    """What the editor needs and has not been collected yet, or not for every layer."""
    editor = module.editor
    kinds = [KEY_COVARIANCES] if editor.needs_covariances else []
    kinds += [GRADIENTS] if editor.needs_gradients else []
    workspace = Workspace.of(module.model, module.tokenizer, family=module.family)
    layers = editor.editable_layers(workspace)
    asked = (
        statistics_of(kind, workspace, layers, corpus, module.corpus, module.corpus_tokens, cache) for kind in kinds
    )
    return [statistics for statistics in asked if statistics.missing()]


def _tokens(tokenizer: Any, texts: Iterable[str], most: int, length: int) -> int:
    """Tokens that a collection over these texts reads."""
    total = 0
    for text in texts:
        total += sum(map(len, sequences_of(tokenizer, text, length)))
        if total >= most:
            return most
    return total


def _batch(session: EditSession, requests: Sequence[EditRequest]) -> dict[str, float]:
    """Seconds per edit by stage."""
    return session.apply(session.plan(requests))[0].stages


def _measured(
    session: EditSession, requests: Sequence[EditRequest], batch_size: int, retention: Retention
) -> dict[str, float]:
    """Seconds of all evaluations, by what a few requests take."""
    few, workspace = requests[:ASKED], session.workspace
    reference = LocalityReference()
    began = time.perf_counter()
    reference.collect(workspace.model, workspace.prompter, few)
    asking = (time.perf_counter() - began) / len(few) * len(requests)
    began = time.perf_counter()
    evaluate(workspace.model, workspace.prompter, few, reference)
    each = (time.perf_counter() - began) / len(few)
    asked = questions_asked(len(requests), batch_size, retention.every_n, retention.at_start, retention.at_end)
    return {"the unedited model's answers": asking, "retention": each * asked}


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def time_table(found: Time, stages: Mapping[str, float], n_edits: int) -> Table:
    """Where the time goes; the middle column has seconds per edit once methods have done what they do only once."""
    table = Table("time for", "per edit", f"{n_edits} edits", title="Time, as measured", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for what, seconds in found.preparing.items():
        table.add_row(what, "", time_text(seconds))
    for what, seconds in found.editing.items():
        table.add_row(what, time_text(stages.get(what, 0.0)), time_text(seconds))
    for what, seconds in found.measuring.items():
        table.add_row(what, "", time_text(seconds))
    table.add_row("together", time_text(sum(stages.values())), time_text(found.total), style="bold")
    return table
