"""The elastic net: a penalty that keeps a change sparse and small."""

from __future__ import annotations

from torch import Tensor

from lit_edit.settings import Configured


class ElasticNet(Configured):
    r"""``λ Σ_i |z_i| / (score_i + ε) + μ ‖z‖²`` (EAC, Xu et al. 2025, Eq. 4 and 5).

    A scored net presses hardest on coordinates that matter little. Differentiable wherever the change is not zero; at
    zero the subgradient of ``|z_i|`` is taken to be 0.

    Args:
        l1: ``λ``; 0 leaves the first term out.
        l2: ``μ``; 0 leaves the second term out.
        eps: ``ε``, in the score's own unit: keeps the weight of a coordinate without any score finite.

    Raises:
        ValueError: for a weight that is negative or not finite, or an ``eps`` that is not positive.
    """

    def __init__(self, l1: float = 5e-7, l2: float = 1e-3, eps: float = 1e-8) -> None:
        for name, weight in (("l1", l1), ("l2", l2)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"The elastic net's {name} must be a finite number of at least 0, not {weight}.")
        if not 0 < eps < float("inf"):
            raise ValueError(f"The elastic net's eps must be positive and finite, not {eps}.")
        self.l1, self.l2, self.eps = l1, l2, eps

    def __call__(self, change: Tensor, score: Tensor | None = None) -> Tensor:
        """The penalty of each row of a change.

        Args:
            change: ``z (..., d)``, what is added to a value or a weight. For one penalty of a whole weight, flatten it.
            score: ``(..., d)``, at least 0: how much each coordinate matters. None weighs all alike (``α_i = 1``):
                the plain elastic net, as for fine-tuning.

        Returns:
            ``(...)``, in the change's dtype.
        """
        size = change.abs() if score is None else change.abs() / (score + self.eps)
        return self.l1 * size.sum(-1) + self.l2 * change.square().sum(-1)
