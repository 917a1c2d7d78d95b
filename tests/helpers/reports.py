"""Made-up runs in the files that real ones leave, written by what writes those."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from lit_edit.evaluation.evaluate import Outcome, Question, figures
from lit_edit.requests import EditRequest
from lit_edit.runs.journal import Edit, Journal
from lit_edit.runs.outcomes import FILE_NAME, outcome_record, write_outcomes
from lit_edit.runs.results import ResultsLogger

ANSWERS = ("Oslo", "Lima", "Rome", "Cork", "Bern")
REPHRASINGS, NEIGHBOURS = 2, 6


def write_run(
    folder: Path,
    *,
    name: str = "memit",
    edits: int = 12,
    every: int = 4,
    seed: int = 0,
    keeps: float = 0.9,
    planned: int | None = None,
    subject: str = "Land",
    answer: str | None = None,
    spectra: bool = False,
) -> Path:
    """A run whose edits are forgotten one after another.

    Args:
        folder: Where it goes; made if missing.
        name: Configuration.
        edits: How many were made.
        every: Edits between two evaluations.
        seed: Of what is forgotten.
        keeps: Chance of an answer to be right at an evaluation.
        planned: Edits asked for; ``edits`` if None.
        subject: What the subjects' names begin with.
        answer: What the model says where it is wrong; one of `ANSWERS` if None.
        spectra: Whether to write ``spectra.json``, too.
    """
    chance = random.Random(seed)
    requests = [
        EditRequest(f"c{i}", f"The capital of {subject}{i} is", f"{subject}{i}", ANSWERS[i % len(ANSWERS)])
        for i in range(edits)
    ]
    journal, logger = Journal(), ResultsLogger(folder)
    counts = sorted({*range(0, edits, every), edits})
    written = [chance.random() < 0.95 for _ in requests]

    def asked(kind: str, prompt: str, expected: str, right: bool) -> Question:
        said = expected if right else answer or chance.choice(ANSWERS) + "ville"
        share = 0.9 if right else 0.01
        return Question(kind, prompt, expected, said, right, float(right), share, 1 if right else 7)

    def outcome(i: int, request: EditRequest, edited: bool) -> Outcome:
        holds = edited and written[i] and chance.random() < keeps
        questions = [asked("reliability", request.prompt, request.target_new, holds)]
        for k in range(REPHRASINGS):
            right = holds and chance.random() < keeps
            questions.append(asked("generalization", f"{k}: {request.subject}'s capital", request.target_new, right))
        for k in range(NEIGHBOURS):
            same = not edited or chance.random() < keeps
            kind = "same_subject" if k == 0 and i % 3 == 0 and edited else "locality"
            questions.append(asked(kind, f"The capital of Place{i}.{k} is", f"Town{i}.{k}", same))
        return Outcome(request, questions)

    for i, request in enumerate(requests):
        stages = {"values": 0.3 + 0.1 * seed, "solve": 0.05, "write": 0.01}
        said = request.target_new if written[i] else "Nowhere"
        journal.add(
            request,
            Edit(
                number=i + 1,
                case_id=request.case_id,
                prompt=request.prompt,
                subject=request.subject,
                target_new=request.target_new,
                layers=[2, 3],
                loss=0.04,
                p_value=0.95,
                p_target=0.9 if written[i] else 0.1,
                steps=20,
                change={"2": 0.01, "3": 0.02},
                seconds=sum(stages.values()),
                exact=written[i],
                rank=1 if written[i] else 4,
                answer=said,
                stages=stages,
            ),
        )
    settings = {
        "model": {"editor": {"class_path": "lit_edit.editors.LocateThenEdit", "init_args": {"contexts": seed}}},
        "data": {"class_path": "lit_edit.datamodules.FactsDataModule", "init_args": {"n_edits": edits}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    logger.log_run(about(name, seed, planned or edits))
    for count in counts:
        found = [outcome(i, r, bool(count)) for i, r in enumerate(requests) if i < count or not count]
        made = journal.edits[:count] if count else [None] * len(found)
        before = "Elsewhere"
        records = [outcome_record(o, edit, count, before) for o, edit in zip(found, made, strict=True)]
        write_outcomes(folder / FILE_NAME, records)
        grown = 60.0 + count * (1 + seed)
        weights = {f"stability/blocks.{layer}.weight/frobenius_norm": grown + layer for layer in (2, 3)}
        stability = {"stability/mean_frobenius_norm": grown + 2.5, "stability/worst_condition_number": 6.0 + count}
        abilities = {"downstream/qa": 1 - 0.01 * count / edits, "downstream/sentiment": 1.0}
        judged = figures(found, ("exact_match", "token_accuracy"))
        logger.log_metrics(judged | weights | stability | abilities, count)
    logger.log_run({"seconds": 12.5 * edits, "seconds_per_edit": journal.seconds_by_stage()})
    journal.write(folder / "edits.jsonl")
    if spectra:
        values = [50 * 0.98**i for i in range(600)]
        content = {f"blocks.{n}.weight": {"before": values, "after": [v * 1.5 for v in values]} for n in (2, 3)}
        (folder / "spectra.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def about(name: str, seed: int, n_edits: int) -> dict[str, Any]:
    """A run record as the command line writes it."""
    return {
        "name": name,
        "method": name.upper(),
        "model": "embedded",
        "data": "FactsDataModule",
        "data_path": "facts.json",
        "n_edits": n_edits,
        "batch_size": 1,
        "seed": seed,
        "device": "cpu",
        "threads": 2,
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2, "memory_bytes": 16_000_000_000},
        "peak_memory_bytes": 630_000_000,
    }
