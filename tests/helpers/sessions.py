"""Sessions on tiny random models: one editor of every kind, facts to write, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from helpers.models import tiny_model
from helpers.runs import TEXTS
from lit_edit.editors import Editor, FineTune, Guard, LocateThenEdit, Mending, MoseOFT
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.solvers import MEMIT, MOSE, ROME, AlphaEdit, Isospectral, MOSEKey
from lit_edit.editors.values import NormClamp, NormMatched, ValueOptimizer
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession, Preparation

PEOPLE = ["Maria of Rome", "Ben of Oslo", "Ada of Paris", "Ira of Lima", "Eva of Bonn", "Tom of Cork"]
FACTS = [EditRequest(str(i), f"{who} was born in", who, where) for i, (who, where) in enumerate(
    zip(PEOPLE, ["Oslo", "Paris", "Rome", "Peru", "Lima", "Bern"], strict=True)
)]  # fmt: skip


def values(constraint: Any = None, **changes: Any) -> ValueOptimizer:
    settings = {"lr": 0.5, "lr_unit": "relative", "steps": 25, "kl_factor": 0.0, "weight_decay": 0.0} | changes
    return ValueOptimizer(constraint=constraint or NormClamp(40.0), **settings)


def locate(solver: Any, constraint: Any = None, **changes: Any) -> LocateThenEdit:
    parts = {"layers": FixedLayers([1, 2]), "values": values(constraint), "contexts": 0} | changes
    return LocateThenEdit(solver=solver, **parts)


MAKERS: dict[str, Callable[[], Editor]] = {
    "ROME": lambda: locate(ROME()),
    "MEMIT": lambda: locate(MEMIT(1e-3, memory=True)),
    "AlphaEdit": lambda: locate(AlphaEdit(None, 0.5, 1e-3)),
    "MOSE": lambda: locate(MOSE(1e-3), NormMatched()),
    "MOSEKey": lambda: locate(MOSEKey(1e-3), NormMatched()),
    "Isospectral": lambda: locate(Isospectral(1e-3), NormMatched()),
    "FineTune": lambda: FineTune([1, 2], lr=5e-3, steps=15),
    "MoseOFT": lambda: MoseOFT([1, 2], lr=2e-2, steps=15, radius=None),
}


def session(editor: Editor, mending: Mending | None = None, guard: Guard | None = None, **more: Any) -> EditSession:
    """On a tiny model, always the same."""
    model, tokenizer = tiny_model("llama")
    return EditSession(model, tokenizer, editor, Preparation(corpus=TEXTS), mending, guard=guard, **more)


def write(opened: EditSession, requests: list[EditRequest], batch_size: int = 1) -> EditSession:
    """Edits, batch after batch."""
    for start in range(0, len(requests), batch_size):
        opened.apply(opened.plan(requests[start : start + batch_size]))
    return opened


def contents(opened: EditSession) -> dict[int, Tensor]:
    """Copies of the editable weights."""
    return {site.layer: site.stored.clone() for site in opened.sites}
