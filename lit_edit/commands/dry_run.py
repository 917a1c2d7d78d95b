"""``fit --dry_run``: what a run would do, need and take. Nothing is written, and nothing that is edited is kept.

What lasts in memory is computed before the model is loaded, from its configuration. Time, and the peak of memory,
are measured: the first batches are planned and applied to the loaded model, in memory; the process ends afterwards.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lit_edit.algebra.exact import can_have_remainder
from lit_edit.callbacks import Retention
from lit_edit.commands.options import made
from lit_edit.commands.review import review, review_table
from lit_edit.datamodules import EditDataModule
from lit_edit.editors import Editor
from lit_edit.evaluation.evaluate import Reference, evaluate
from lit_edit.model.families import FAMILIES, Family
from lit_edit.model.loading import AUTO, DTYPES, EMBEDDED, LoadingError, dtype_of, embedded_path, refuse_quantised
from lit_edit.model.prompts import check_requests
from lit_edit.model.workspace import Workspace
from lit_edit.module import LitEdit
from lit_edit.program import program
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession
from lit_edit.statistics import GradientCollector, KeyCollector, Statistics, warn_if_few
from lit_edit.units import size_text, time_text

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


def foresee(config: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Prints the memory that lasts through a run, from its settings and without loading the model.

    Args:
        config: Settings of ``fit``: ``model``, ``data`` and ``trainer``.
        console: Where to print.

    Returns:
        The same in the types of JSON; nothing for a model that loading will say more about.

    Raises:
        ValueError: If that does not fit into the memory at hand, or settings or data are wrong.
    """
    model, data = config["model"], made(EditDataModule, config["data"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the run's own data module says the same
        data.setup("fit")
    found = skeleton(model["model"], model["dtype"])
    family = Family(**model["family"]) if model.get("family") else None
    if found is None or (family is None and found[0].config.model_type not in FAMILIES):
        return {}  # loading the model will say why
    workspace = Workspace.of(*found, family=family, chat_template=bool(model.get("chat_template")))
    check_requests(data.requests, workspace.prompter)
    device = _device(str((config.get("trainer") or {}).get("accelerator") or "auto"))
    need = memory_needed(workspace, made(Editor, model["editor"]), len(data.requests))
    there = memory_at_hand(device)
    table = Table(
        "memory for", "about", title="Memory that lasts, from the model's configuration", title_justify="left"
    )
    table.columns[1].justify = "right"
    for what, size in sorted(need.items(), key=lambda item: -item[1]):
        table.add_row(what, size_text(size))
    total = sum(need.values())
    table.add_row("together", size_text(total), style="bold")
    if there is not None:
        table.add_row(f"{'GPU memory' if device.type == 'cuda' else 'memory'} at hand", size_text(there))
    console.print(table)
    console.print()
    if there is not None and total > there:
        raise ValueError(
            f"{model['model']!r} needs {size_text(total)} for what lasts alone, {size_text(there)} are at hand: take "
            "--model.dtype=bfloat16, fewer layers, or a larger machine."
        )
    return {"memory_bytes": {**need, "together": total, "at hand": there}}


def memory_needed(workspace: Workspace, editor: Editor, edits: int) -> dict[str, int]:
    """Bytes that last from the first to the last edit, by what they are for, from shapes alone.

    Args:
        workspace: Of the model, whose weights may take no memory.
        editor: The method.
        edits: Number of edits of the run.

    Raises:
        ValueError: If the editor wants layers that the model does not have.
    """
    parts = [workspace.architecture[layer] for layer in editor.editable_layers(workspace)]
    shapes = [tuple(part.weight.shape) for part in parts]
    weights = {id(t): t for t in (*workspace.model.parameters(), *workspace.model.buffers())}.values()
    need = {"weights": sum(t.numel() * t.element_size() for t in weights)}
    need["original weights"] = sum(p.weight.numel() * p.weight.element_size() for p in parts)
    if can_have_remainder(parts[0].weight.dtype):
        need["what rounding took"] = need["original weights"]
    if editor.needs_covariances:
        need["key covariances"] = sum(8 * p * p for _, p in shapes)
    if editor.needs_gradients:
        need["language-model gradients"] = sum(8 * d * p for d, p in shapes)
    need["what the method keeps"] = sum(8 * editor.kept_size(d, p) for d, p in shapes)
    need["keys and targets of past edits"] = sum(4 * (d + p) * edits for d, p in shapes)
    return {what: size for what, size in need.items() if size}


def skeleton(name: str, dtype: str) -> tuple[Any, Any] | None:
    """A model whose weights have shapes and dtypes but take no memory, and its tokenizer; None if there is none."""
    where = str(embedded_path("model")) if name == EMBEDDED else str(Path(name).expanduser())
    if dtype not in (*DTYPES, AUTO):
        return None
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        refuse_quantised(name, config)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(dtype, config), trust_remote_code=False)
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


def rehearse(
    module: LitEdit, data: EditDataModule, retention: Retention | None, device: torch.device, console: Console
) -> dict[str, Any]:
    """Prints the review of the facts and how long the run would take, by what its first batches take.

    Args:
        module: Edited in memory by this; not to be used afterwards.
        data: The facts.
        retention: Evaluates along the run; None if nothing does.
        device: Where to compute.
        console: Where to print.

    Returns:
        The same in the types of JSON.

    Raises:
        ValueError: For everything that would end the run before its first edit, and at the first if the corpus has too
            few tokens for the method.
    """
    data.setup("fit")
    requests, size = data.requests, data.batch_size
    check_requests(requests, module.prompter)
    reviewed = review(requests, module.model.to(device), module.prompter)
    console.print(review_table(reviewed))
    console.print()
    session, preparing = _prepared(module, requests, size)
    measuring = {} if retention is None else _measured(session, requests, size, retention)
    first = later = session.apply(session.plan(requests[:size]))[0].stages
    if len(requests) > size and sum(first.values()) * size < LONG:
        later = session.apply(session.plan(requests[size : 2 * size]))[0].stages
    editing = editing_time(first, later, len(requests), size)
    table = Table("time for", "per edit", f"{len(requests)} edits", title="Time, as measured", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for what, seconds in preparing.items():
        table.add_row(what, "", time_text(seconds))
    for what, seconds in editing.items():
        table.add_row(what, time_text(later.get(what, 0.0)), time_text(seconds))
    for what, seconds in measuring.items():
        table.add_row(what, "", time_text(seconds))
    total = sum(sum(part.values()) for part in (preparing, editing, measuring))
    table.add_row("together", time_text(sum(later.values())), time_text(total), style="bold")
    console.print(table)
    console.print(
        f"{len(requests)} edits would take about {time_text(total)}, general abilities and figures of matrices not "
        f"counted. The rehearsal took {size_text(_peak(device))} of memory at its highest, the program included. "
        "Nothing was written.",
        highlight=False,
    )
    advised = advice(preparing, editing, measuring, len(requests), size, retention)
    for line in advised:
        console.print(f"Advice: {line}", markup=False)
    return {
        "edits": len(requests),
        "facts": [
            {
                **{"case_id": r.request.case_id, "prompt": r.request.prompt, "target_new": r.request.target_new},
                **{"probability": r.probability, "known": r.known, "same_as": r.repeats},
                **{"contradicts": list(r.contradicts), "disturbs": list(r.disturbs)},
            }
            for r in reviewed
        ],
        "seconds": {**preparing, **editing, **measuring, "together": total},
        "seconds_per_edit": later,
        "peak_memory_bytes": _peak(device),
        "advice": advised,
    }


def advice(
    preparing: Mapping[str, float],
    editing: Mapping[str, float],
    measuring: Mapping[str, float],
    n_edits: int,
    batch_size: int,
    retention: Retention | None,
) -> list[str]:
    """What would make a run shorter, if something other than editing takes most of it.

    Args:
        preparing: Seconds until the first edit.
        editing: Seconds of all edits by stage.
        measuring: Seconds of evaluations.
        n_edits: Number of edits.
        batch_size: Number edited at once.
        retention: What evaluates along the run.
    """
    total = sum(sum(part.values()) for part in (preparing, editing, measuring))
    found = []
    asking = measuring.get("retention", 0.0)
    if retention is not None and asking > total / 2:
        now = sum(retention.counts(n_edits, batch_size)) + retention.at_start * n_edits
        rarer = Retention(every_n=n_edits)
        seldom = asking / now * (sum(rarer.counts(n_edits, batch_size)) + n_edits)
        if seldom < 0.9 * asking:
            every = max(n_edits // 2, 1)
            half = Retention(every_n=every)
            less = asking / now * (sum(half.counts(n_edits, batch_size)) + n_edits)
            every, less = (every, less) if less < 0.9 * asking else (n_edits, seldom)
            found.append(
                f"evaluation would take {time_text(asking)} of {time_text(total)}: with --retention.every_n={every} it "
                f"is {time_text(less)}."
            )
    collecting = preparing.get("statistics", 0.0)
    if collecting > max(total / 2, LONG):
        found.append(
            f"collecting statistics would take {time_text(collecting)} of {time_text(total)}: `{program()} statistics` "
            "with the same options does it once for all runs, and goes on if it is cut."
        )
    return found


def editing_time(
    first: Mapping[str, float], later: Mapping[str, float], n_edits: int, batch_size: int
) -> dict[str, float]:
    """Seconds of all edits by stage.

    Args:
        first: Seconds per edit in the first batch, in which some methods do what they do only once.
        later: Seconds per edit in a batch after it.
        n_edits: Number of edits.
        batch_size: Number edited at once.
    """
    at_first = min(batch_size, n_edits)
    return {
        stage: first.get(stage, 0.0) * at_first + later.get(stage, 0.0) * (n_edits - at_first)
        for stage in dict.fromkeys([*first, *later])
    }


def _prepared(
    module: LitEdit, requests: Sequence[EditRequest], batch_size: int
) -> tuple[EditSession, dict[str, float]]:
    """A session as the run would have it, and the seconds until its first edit.

    Statistics that are not there yet are taken over a few tokens only, and their time is scaled to the tokens asked
    for. They are good enough to see how long an edit takes, not for the edit itself. Covariances that will be singular
    are left so: methods that invert them refuse them here as they would in the run.
    """
    how, missing = module.preparation, _missing(module)
    if missing and not how.collect_statistics:
        missing[0].get(may_collect=False)
    sampled = min(how.corpus_tokens, SAMPLED_TOKENS)
    with tempfile.TemporaryDirectory() as nowhere, warnings.catch_warnings():
        if missing:
            warnings.simplefilter("ignore", UserWarning)  # that the tokens of the sample are few
            how = replace(how, corpus_tokens=sampled, cache_dir=nowhere)
        session = EditSession(module.model, module.tokenizer, module.editor, how, requests=requests)
    preparing = dict(session.prepared)
    if missing:
        preparing["statistics"] *= module.preparation.corpus_tokens / sampled
        features = {site.name: site.shape[1] for site in session.sites if site.covariance is not None}
        warn_if_few(features, module.preparation.corpus_tokens, stacklevel=2)
        for site in session.sites:
            if site.covariance is not None and module.preparation.corpus_tokens > max(sampled, site.shape[1]):
                ridge = _RIDGE * site.covariance.diagonal().mean()
                site.covariance = site.covariance + ridge * torch.eye(site.shape[1], dtype=torch.float64)
    began = time.perf_counter()
    session.check(requests, batch_size)
    preparing["checks"] = time.perf_counter() - began
    return session, preparing


def _missing(module: LitEdit) -> list[Statistics]:
    """What the editor needs and has not been collected yet, or not for every layer."""
    editor = module.editor
    kinds = [KeyCollector] * editor.needs_covariances + [GradientCollector] * editor.needs_gradients
    workspace = Workspace.of(module.model, module.tokenizer, family=module.preparation.family)
    layers = editor.editable_layers(workspace)
    asked = [module.preparation.statistics(kind, workspace, layers) for kind in kinds]
    return [statistics for statistics in asked if statistics.missing()]


def _measured(
    session: EditSession, requests: Sequence[EditRequest], batch_size: int, retention: Retention
) -> dict[str, float]:
    """Seconds of all evaluations, by what a few requests take."""
    few, workspace = requests[:ASKED], session.workspace
    reference = Reference()
    began = time.perf_counter()
    reference.collect(workspace.model, workspace.prompter, few)
    asking = (time.perf_counter() - began) / len(few) * len(requests)
    began = time.perf_counter()
    evaluate(workspace.model, workspace.prompter, few, reference)
    each = (time.perf_counter() - began) / len(few)
    asked = sum(retention.counts(len(requests), batch_size)) + retention.at_start * len(requests)
    return {"the unedited model's answers": asking, "retention": each * asked}


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
