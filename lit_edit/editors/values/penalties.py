"""Penalties: further terms of the loss that v* is optimised under, which look at the layer a value belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_edit.algebra.subspaces import cleaned
from lit_edit.editors.restraints.o_edit import ImplicitKnowledge, written
from lit_edit.editors.solvers import Solver
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.settings import Configured


class Penalty(Configured, ABC):
    """A further term of the loss.

    Attributes:
        needs_gradient: Whether the gradient statistics of the layers have to be collected.
    """

    needs_gradient: bool = False

    def check(self, solver: Solver) -> None:
        """Raises ValueError for solvers with which the term has no meaning; asked when an editor is put together."""

    @abstractmethod
    def prepare(self, sites: Sequence[EditedWeight]) -> Callable[[Tensor], Tensor]:
        """The term for one optimisation.

        Args:
            sites: Layer of every slot, a slot being a request and a layer whose output is free.

        Returns:
            A differentiable function of the changes ``v − v0 (slots, d)`` that gives a number per slot, ``(slots,)``.
        """


class OEdit(Penalty):
    r"""O-Edit's terms (Cai and Cao 2024, Eq. 13, 25, 27): residuals that avoid the directions already taken.

    .. math:: λ_1 \frac1r \sum_i \mathrm{sim}(V_r[i], v - W k) + λ_2 \frac1q \sum_i \mathrm{sim}(V_q[i], v - W k)

    ``V_r`` is a basis of the column space of all edits in the layer so far, ``V_q`` are the ``q = ⌊gradient_share ·
    edits⌋`` leading left singular vectors of the gradient of the language-model loss on text, without their part in
    ``V_r`` (Eq. 26; the batch's own edits counted). A term whose space is empty, or whose weight is 0, is 0; so is the
    similarity of a change that is still zero, with no gradient there.

    At site ``block`` the change of the last edited block stands for ``v − W k``, with the subspaces of that layer. The
    paper edits a single layer, where both are the same.

    Args:
        past_weight: ``λ1``.
        implicit_weight: ``λ2``.
        gradient_share: ``λ3``, directions of the gradient per edit; 0 for none.
        similarity: ``absolute`` takes the absolute value of the cosine, ``plain`` the cosine itself, as the paper
            prints it. Singular vectors have no sign, so the plain cosine is a different loss from one decomposition to
            the next, and the least where a residual points against them; what the terms stand for (Eq. 7, 8) and what
            the paper measures (its figure 4) is orthogonality. Hence the default.
        max_directions: The most directions of the gradient; None for no such limit.

    Raises:
        ValueError: for weights, a share or a limit below 0, or an unknown similarity.
    """

    def __init__(
        self,
        past_weight: float = 50.0,
        implicit_weight: float = 50.0,
        gradient_share: float = 2.5,
        similarity: Literal["absolute", "plain"] = "absolute",
        max_directions: int | None = None,
    ) -> None:
        for name, weight in (("past_weight", past_weight), ("implicit_weight", implicit_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"O-Edit's {name} must be a finite number of at least 0, not {weight}.")
        if similarity not in ("absolute", "plain"):
            raise ValueError(f"O-Edit's similarity is 'absolute' or 'plain', not {similarity!r}.")
        self.past_weight, self.implicit_weight, self.similarity = past_weight, implicit_weight, similarity
        self.implicit = ImplicitKnowledge(gradient_share, max_directions)
        self.needs_gradient = implicit_weight > 0 and gradient_share > 0

    def check(self, solver: Solver) -> None:
        """Refuses solvers that turn a weight: the sum of their updates has full rank and leaves no direction free."""
        if not solver.additive:
            raise ValueError(
                f"O-Edit keeps edits out of the column space of all edits so far, and {type(solver).__name__} "
                "multiplies the weight by an orthogonal matrix: its first edit already fills the whole space. Leave "
                "the penalty out, or take an additive solver (ROME, MEMIT, EMMET, AlphaEdit)."
            )

    @torch.no_grad()
    def prepare(self, sites: Sequence[EditedWeight]) -> Callable[[Tensor], Tensor]:
        """The two terms with the subspaces as they are now."""
        if not (self.past_weight or self.needs_gradient):
            return lambda change: change.new_zeros(len(change))
        by_layer: dict[int, list[int]] = {}
        for slot, site in enumerate(sites):
            by_layer.setdefault(site.layer, []).append(slot)
        device = sites[0].device if sites else None
        # Laid out before the steps of an optimisation, none of which then has to wait for a copy to a GPU.
        parts = [(torch.tensor(slots, device=device), self._directions(sites[slots[0]])) for slots in by_layer.values()]

        def penalty(change: Tensor) -> Tensor:
            total = change.new_zeros(len(change))
            for at, directions in parts:
                found = [w * self._similarity(change[at], basis) for w, basis in directions]
                total = total.index_add(0, at, torch.stack(found).sum(0)) if found else total
            return total

        return penalty

    def _directions(self, site: EditedWeight) -> list[tuple[float, Tensor]]:
        """The weight and the unit vectors (d, n) of every term that is not empty."""
        past = written(site)
        terms = [(self.past_weight, past)]
        if self.needs_gradient:
            implicit = cleaned(self.implicit.directions(site), past)
            terms.append((self.implicit_weight, implicit / implicit.norm(dim=0)))
        return [(weight, basis) for weight, basis in terms if weight and basis.shape[1]]

    def _similarity(self, change: Tensor, directions: Tensor) -> Tensor:
        """Mean over the directions (d, n) of the similarity with each change (m, d): (m,)."""
        length = change.norm(dim=-1, keepdim=True)
        moved = length > 0
        # A zero change has no direction: its cosine is 0, and the other branch keeps its gradient finite.
        cosine = (change / torch.where(moved, length, 1.0)) @ directions.to(change) * moved
        return (cosine.abs() if self.similarity == "absolute" else cosine).mean(-1)
