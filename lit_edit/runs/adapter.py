"""What edits changed, as a LoRA adapter that `peft` loads and merges."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_edit.algebra.linalg import thin_svd
from lit_edit.files import write_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# What `peft` adds is in float32: a change is told from rounding up to a few steps of the precision of a weight.
_STEPS = 4


@dataclass(frozen=True)
class Adapter:
    """An adapter that was written.

    Attributes:
        ranks: By parameter name.
        error: Largest relative error of a weight, ``‖W + BA - W_edited‖_F / ‖W_edited‖_F``.
        lost: The same in terms of the change, ``‖BA - ΔW‖_F / ‖ΔW‖_F``.
        size: Bytes of its weights.
    """

    ranks: dict[str, int]
    error: float
    lost: float
    size: int


def save_adapter(
    folder: str | os.PathLike[str],
    model: nn.Module,
    originals: Mapping[str, Tensor],
    *,
    base: str,
    rank: int | None = None,
    tolerance: float = 0.0,
) -> Adapter:
    """Writes the sum of all updates of each weight as ``ΔW = B A`` (Hu et al. 2022, "LoRA", with alpha = r).

    Args:
        folder: Made if need be.
        model: The edited model.
        originals: The weights that edits may have touched, as they were, by parameter name.
        base: Name or folder of the model before the edits, for `peft`.
        rank: Take this rank for every weight, whatever is lost. The least rank within the tolerance if None.
        tolerance: Relative error that a weight may have; at least the rounding of its precision.

    Raises:
        ValueError: If nothing was changed, or the change is not of low rank: the adapter would then be as large as the
            weight.
    """
    from safetensors.torch import save_file

    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1.")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    worst = lost = 0.0
    turned = False
    for name, before in originals.items():
        now = model.get_parameter(name).detach().cpu()
        if torch.equal(now, before.cpu()):
            continue
        stored_transposed = isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
        turned = turned or stored_transposed
        change = now.double() - before.cpu().double()
        change = change.T if stored_transposed else change  # (out, in), as A and B see it
        left, sizes, right = thin_svd(change)
        length, whole = float(now.double().norm()), float(change.norm())
        least = max(tolerance, _STEPS * torch.finfo(now.dtype).eps)
        beyond = sizes.square().flip(0).cumsum(0).flip(0).sqrt()  # what all singular values from each on amount to
        r = max(int((beyond > least * length).sum()), 1) if rank is None else min(rank, len(sizes))
        if rank is None and r * sum(change.shape) >= change.numel():
            raise ValueError(
                f"The change of {name} is not of low rank: within a relative error of {least:.1g} it takes {r} of "
                f"{len(sizes)}, and an adapter would be no smaller than the weight. Write --delta or --out, or take "
                f"less: with --rank {max(1, len(sizes) // 8)} an error of "
                f"{float(beyond[max(1, len(sizes) // 8)]) / length:.2g} remains, of the change itself "
                f"{float(beyond[max(1, len(sizes) // 8)]) / whole:.2g}."
            )
        root = sizes[:r].sqrt()
        b, a = (left[:, :r] * root).float().contiguous(), (root[:, None] * right[:r]).float().contiguous()
        missing = float((b.double() @ a.double() - change).norm())
        worst, lost = max(worst, missing / length), max(lost, missing / whole)
        place = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = a, b
        ranks[name] = r
    if not ranks:
        raise ValueError("No weight was changed: there is nothing to make an adapter of.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    most = max(ranks.values())
    by_module = {name.removesuffix(".weight"): r for name, r in ranks.items()}
    write_json(
        folder / CONFIG_FILE,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": most,
            "lora_alpha": most,
            "rank_pattern": by_module,
            "alpha_pattern": by_module,  # alpha = r: the product is added as it is
            "target_modules": list(by_module),
            "fan_in_fan_out": turned,
            "lora_dropout": 0.0,
            "bias": "none",
        },
    )
    return Adapter(ranks, worst, lost, (folder / WEIGHTS_FILE).stat().st_size)
