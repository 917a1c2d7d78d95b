"""MEND: an edit as one gradient step that a trained hyper-network corrects (Mitchell et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lit_edit.algebra.updates import LowRank
from lit_edit.editors.base import Editor, Plan
from lit_edit.editors.mend.network import HyperNetwork, HyperNetworkError, gradient_factors
from lit_edit.editors.restraints import Restraint, UpdateKind, check_restraints
from lit_edit.model.edited_weight import Written
from lit_edit.model.fingerprint import model_fingerprint
from lit_edit.model.trial import Factors, edit_batch, low_rank_change, target_nll, target_probability
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest


class MEND(Editor):
    """Edits by ``W ← W − α_l Σ δ̃ ũᵀ``, a batch of requests as one gradient: the sum over all their tokens.

    The layers are those that the hyper-network was trained for. It was trained on the unedited model and knows of no
    other: `check` refuses a model that is not the very same, and a sequence of edits goes on from there on trust.

    Args:
        hypernetwork: ``embedded`` for that of the embedded model, or a folder or file written by
            `lit_edit.editors.mend.training`.
        restraints: What is done to every update of a weight, or to the sum of them, in this order. An update's rank is
            the number of tokens of the batch, not of its requests.

    Raises:
        HyperNetworkError: if there is none; the message says how to train one.
        ValueError: if the restraints do not go together.
    """

    def __init__(
        self,
        hypernetwork: str = "embedded",
        restraints: list[Restraint] | None = None,
    ) -> None:
        self.restraints = list(restraints or [])
        check_restraints(self.restraints, UpdateKind(type(self).__name__))
        self.hypernetwork = hypernetwork
        self.network, self.header = HyperNetwork.load(hypernetwork)

    def editable_layers(self, workspace: Workspace) -> list[int]:
        """Those of the hyper-network."""
        self.network.check(workspace.architecture)
        return list(self.network.layers)

    def check(self, workspace: Workspace, batch_size: int) -> None:
        """Refuses a model other than the one that the hyper-network was trained for."""
        self.network.check(workspace.architecture)
        if model_fingerprint(workspace.model) != self.header["model"]:
            raise HyperNetworkError(
                f"The hyper-network {self.hypernetwork!r} was trained for another model, for this one after edits, or "
                "for it in another dtype. Train one for this model with "
                "`python -m lit_edit.editors.mend.training --help`."
            )

    def plan(self, workspace: Workspace, requests: Sequence[EditRequest]) -> Plan:
        """One gradient of all requests, and what the hyper-network makes of it."""
        with workspace.stopwatch.measure("values"):
            batch = edit_batch(workspace, requests)
            dtype = torch.promote_types(workspace.architecture[self.network.layers[0]].weight.dtype, torch.float32)
            self.network.to(workspace.device, dtype)
            factors = gradient_factors(workspace, self.network.layers, batch)
            with torch.no_grad():
                changes = {}
                for layer, found in factors.items():
                    left, right = self.network.step(layer, found)
                    counts = found.counts
                    changes[layer] = Factors(left.mT[counts].T, right[counts])
                with low_rank_change(workspace, changes):
                    logits = workspace.model(
                        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                    ).logits
                loss = target_nll(logits, batch.labels).tolist()
                probability = target_probability(logits, batch.labels)
        layers, n = tuple(self.network.layers), len(requests)
        return Plan(list(requests), [layers] * n, loss, probability, [1] * n, changes)

    def apply(self, workspace: Workspace, plan: Plan) -> list[Written]:
        """Writes the change of every layer, restrained."""
        return self.write(workspace, plan, lambda site: LowRank(*plan.data[site.layer]))
