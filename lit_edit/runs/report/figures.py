"""What the figures of ``results.json`` are called for people, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_edit.evaluation.evaluate import WAYS

Scale = Literal["share", "linear", "log"]


@dataclass(frozen=True)
class Figure:
    """How a figure is shown.

    Attributes:
        title: For people.
        note: What it says, in a sentence; empty for figures of other callbacks.
        scale: ``share`` runs from 0 to 1.
        panel: Figures of one run that share a panel.
    """

    title: str
    note: str = ""
    scale: Scale = "linear"
    panel: str = ""


FIGURES = {
    "reliability": Figure("reliability", "Edits whose prompt gets the new answer.", "share", "Edits"),
    "generalization": Figure("generalization", "Rephrasings that get the new answer.", "share", "Edits"),
    "portability": Figure("portability", "Consequences of edits that get their answer.", "share", "Edits"),
    "locality": Figure("locality", "Untouched questions that keep their answer.", "share", "Everything else"),
    "locality/same_subject": Figure(
        "locality: same subject", "Other facts of edited subjects, unchanged.", "share", "Everything else"
    ),
    "consistency": Figure(
        "consistency", "Neighbour questions that get the answer an edit wrote.", "share", "Everything else"
    ),
    "instance_change": Figure(
        "instances changed", "Yes-or-no answers about instances that changed.", "share", "Instances"
    ),
    "instance_unclear": Figure(
        "instances unclear", "Answers about instances that are neither yes nor no.", "share", "Instances"
    ),
    "stability/mean_frobenius_norm": Figure("mean norm", "Frobenius norm, mean over the watched weights.", "log"),
    "stability/worst_condition_number": Figure("worst condition number", "Of the watched weights.", "log"),
    "stability/worst_spectrum_drift": Figure(
        "worst spectrum drift", "How far the singular values moved, relatively.", "log"
    ),
    "stability/mean_relative_drift": Figure(
        "mean drift", "How far the weights moved, relative to their norm.", "linear"
    ),
    "orthogonality/mean_cosine": Figure(
        "cosine of updates, mean", "Between the updates of different edits; 0 is orthogonal.", "share", "Cosines"
    ),
    "orthogonality/max_cosine": Figure(
        "cosine of updates, largest", "Of all pairs of edits that were compared.", "share", "Cosines"
    ),
    "activation/unrelated": Figure(
        "activation, other edits", "What the updates of others make of an edit's key.", "log", "Activation scores"
    ),
    "activation/own": Figure(
        "activation, own update", "What an edit's own update makes of its key.", "log", "Activation scores"
    ),
}


_OF_WEIGHTS = ("stability", "spectrum", "orthogonality")


def figure(key: str) -> Figure:
    """How a figure is shown; one that is not known under its own name."""
    if key in FIGURES:
        return FIGURES[key]
    if key.startswith("immediate/"):
        below = figure(key.removeprefix("immediate/"))
        return Figure(f"right after: {below.title}", below.note, "share", "Right after each edit")
    if key.startswith("downstream/"):
        name = key.removeprefix("downstream/")
        return Figure(f"ability: {name}", "Score of a task that no edit is about.", "share", "General abilities")
    if key.startswith("representation/"):
        name = key.removeprefix("representation/").replace("_", " ")
        return Figure(f"moved: {name}", "How far representations moved, relative to their length.", "linear", "Drift")
    if key.startswith("seconds/"):
        return Figure(key.replace("/", ": "), "Mean of an edit since the last measurement.", "linear", "Seconds")
    if key.startswith("lm_eval/"):
        return Figure(key.replace("/", ": ", 1), "By lm-evaluation-harness.", "linear", "General abilities")
    if key.startswith("perplexity"):
        return Figure(key, "Less is better.", "log")
    return Figure(key)


def way_of(key: str) -> str | None:
    """The way of judging that a figure is by, if it is not the first one."""
    way, slash, _ = key.partition("/")
    return way if slash and way in WAYS else None


def is_detail(key: str) -> bool:
    """Whether a figure belongs to another one, or to a single weight, and has no curve or row of its own."""
    if key == "edits" or key.startswith(("interval/", "count/")) or way_of(key) is not None:
        return True
    return weight_of(key) is not None


def weight_of(key: str) -> tuple[str, str] | None:
    """The parameter and the figure of ``stability/<parameter>/<figure>``, and the like of other callbacks."""
    parts = key.split("/")
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] in _OF_WEIGHTS else None


def ordered(keys: set[str]) -> list[str]:
    """Figures in the order in which they are shown."""
    known = list(FIGURES)
    place = {key: i for i, key in enumerate(known)}
    stability = place["stability/mean_frobenius_norm"]

    def rank(key: str) -> tuple[float, str]:
        if key in place:
            return place[key], key
        for offset, prefix in enumerate(("immediate/", "downstream/", "lm_eval/", "perplexity")):
            if key.startswith(prefix):
                return stability - 0.5 + offset / 10, key
        return len(known), key

    return sorted((key for key in keys if not is_detail(key)), key=rank)
