"""MEND's hyper-network: from the factors of a gradient to those of an edit (Mitchell et al. 2022).

The gradient of a loss with respect to a weight is a sum over tokens of outer products ``δ uᵀ``: ``u (p,)`` is what the
projection read, ``δ (d,)`` the gradient at what it put out. A small network turns each pair into another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lit_edit.files import load_tensors, save_tensors
from lit_edit.model.families import Architecture
from lit_edit.model.fingerprint import model_fingerprint
from lit_edit.model.hooks import change_outputs, read_inputs
from lit_edit.model.loading import EMBEDDED, embedded_path
from lit_edit.model.prompts import Batch
from lit_edit.model.trial import Factors, target_nll
from lit_edit.model.workspace import Workspace

FILE_NAME = "hypernetwork.safetensors"
FORMAT_VERSION = 2
_METADATA_KEY = "hypernetwork"
_FLOOR = 1e-2  # of a feature's spread, as a share of the mean spread
_TRAIN = "Train one with `python -m lit_edit.editors.mend.training --help`."


class HyperNetworkError(ValueError):
    """A hyper-network that is missing, damaged, or was trained for another model."""


class TokenFactors(NamedTuple):
    """Per token what a projection read, (rows, T, p), and the loss's gradient at what it put out, (rows, T, d)."""

    u: Tensor
    delta: Tensor

    @property
    def counts(self) -> Tensor:
        """Which tokens take part: (rows, T), false where the gradient or the input is zero throughout."""
        return (self.u != 0).any(-1) & (self.delta != 0).any(-1)


def gradient_factors(workspace: Workspace, layers: Sequence[int], batch: Batch) -> dict[int, TokenFactors]:
    """The factors of the edit loss's gradient: ``∂L/∂W = Σ δ uᵀ`` over rows and tokens, for each layer.

    ``L`` is the sum over rows of the target's negative log-likelihood, the mean over its tokens, so that a row's
    factors do not depend on the rows beside it. The model and its gradients are left alone.
    """
    modules = {layer: workspace.architecture[layer].projection for layer in layers}
    probes: dict[int, Tensor] = {}

    def probing(layer: int) -> Any:
        def probe(output: Tensor) -> Tensor:
            probes[layer] = torch.zeros_like(output, requires_grad=True)
            return output + probes[layer]

        return probe

    changes = {module: probing(layer) for layer, module in modules.items()}
    with torch.enable_grad(), read_inputs(modules) as seen, change_outputs(changes):
        logits = workspace.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        loss = target_nll(logits, batch.labels).sum()
        found = torch.autograd.grad(loss, [probes[layer] for layer in layers])
    return {
        layer: TokenFactors(seen[layer].detach(), delta.detach()) for layer, delta in zip(layers, found, strict=True)
    }


class _LowRankStep(nn.Module):
    """``z + relu(s ⊙ (U V z + b) + o)``, with a scale ``s`` and an offset ``o`` per layer; the identity at first."""

    def __init__(self, width: int, rank: int, modes: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.down = nn.Parameter(torch.empty(rank, width))
        nn.init.xavier_uniform_(self.down)
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.offset = nn.Parameter(torch.zeros(modes, width))

    def forward(self, z: Tensor, mode: int) -> Tensor:
        """(..., width) to the same."""
        inner = z @ self.down.T @ self.up.T + self.bias
        # Not `relu`, whose gradient at 0 is 0: where everything starts, nothing would ever move.
        return z + (self.scale[mode] * inner + self.offset[mode]).clamp(min=0)


class HyperNetwork(nn.Module):
    """MEND's editor (Mitchell et al. 2022, Eq. 3): gradient factors to edit factors, one network per weight shape.

    ``z = [norm(u), norm(δ)]``, ``h = z + relu(s₁ ⊙ (U₁ V₁ z + b₁) + o₁)`` and so on once per hidden layer and once
    more; the result is split into ``[ũ, δ̃]``. Layers of one shape share ``U``, ``V`` and ``b`` and have ``s`` and ``o``
    of their own. The edit is ``W ← W − α_l Σ δ̃ ũᵀ`` with a learned step size ``α_l`` for each layer.

    ``U`` starts at zero: a new network is the identity, and without statistics (`gather`) the edit is a step of plain
    gradient descent. `norm` takes each feature's mean and standard deviation over the tokens of training requests.
    The published code keeps these per shape and updates them while training; here each layer has its own, fixed before
    training starts, and a feature's spread counts as at least a hundredth of the mean spread, since a feature that
    never varied in training would otherwise outweigh all others in an edit where it does.

    Args:
        shapes: Shape (d, p) of each layer's weight.
        rank: Rank of ``U V``.
        hidden: Number of hidden layers.
        edit_lr: Start of every ``α_l``.

    Raises:
        ValueError: for no layer, or numbers out of range.
    """

    def __init__(
        self, shapes: Mapping[int, tuple[int, int]], rank: int = 1920, hidden: int = 1, edit_lr: float = 1e-4
    ) -> None:
        super().__init__()
        if not shapes:
            raise ValueError("A hyper-network needs at least one layer.")
        if not (rank >= 1 and hidden >= 0 and edit_lr > 0):
            raise ValueError(
                f"A hyper-network needs rank >= 1, hidden >= 0 and edit_lr > 0, not {rank}, {hidden}, {edit_lr}."
            )
        self.shapes = {layer: (int(d), int(p)) for layer, (d, p) in sorted(shapes.items())}
        self.rank, self.hidden = rank, hidden
        self.layers = list(self.shapes)
        kinds = {
            shape: [layer for layer in self.layers if self.shapes[layer] == shape] for shape in self.shapes.values()
        }
        self._kind = {layer: (_key(shape), layers.index(layer)) for shape, layers in kinds.items() for layer in layers}
        self.networks = nn.ModuleDict(
            {
                _key(shape): nn.ModuleList(
                    _LowRankStep(sum(shape), min(rank, sum(shape)), len(layers)) for _ in range(hidden + 1)
                )
                for shape, layers in kinds.items()
            }
        )
        self.edit_lr = nn.Parameter(torch.full((len(self.layers),), edit_lr))
        for layer, shape in self.shapes.items():
            self.register_buffer(f"mean_{layer}", torch.zeros(sum(shape)))
            self.register_buffer(f"spread_{layer}", torch.ones(sum(shape)))

    @torch.no_grad()
    def gather(self, samples: Mapping[int, TokenFactors]) -> None:
        """Takes each layer's mean and spread from the tokens of ``samples`` that count.

        Raises:
            ValueError: if fewer than two tokens count in a layer.
        """
        for layer, factors in samples.items():
            mask = factors.counts
            if int(mask.sum()) < 2:
                raise ValueError(f"Statistics of layer {layer} need at least two tokens with a gradient.")
            parts = [part[mask].double() for part in factors]
            spread = torch.cat([_floored(part.std(0)) for part in parts])
            self.get_buffer(f"mean_{layer}").copy_(torch.cat([part.mean(0) for part in parts]))
            self.get_buffer(f"spread_{layer}").copy_(spread)

    def step(self, layer: int, factors: TokenFactors) -> Factors:
        """The change of a layer's weight, row by row: ``left (rows, d, T)`` and ``right (rows, T, p)``.

        Differentiable in the network's parameters. Tokens that do not count contribute zero.
        """
        _, p = self.shapes[layer]
        mean, spread = self.get_buffer(f"mean_{layer}"), self.get_buffer(f"spread_{layer}")
        z = (torch.cat([factors.u, factors.delta], dim=-1).to(mean.dtype) - mean) / spread
        name, mode = self._kind[layer]
        for part in cast(nn.ModuleList, self.networks[name]):
            z = part(z, mode)
        u, delta = z[..., :p], z[..., p:] * factors.counts.unsqueeze(-1)
        return Factors(-self.edit_lr[self.layers.index(layer)] * delta.mT, u)

    def save(self, folder: str | Path, model: nn.Module, figures: Mapping[str, Any] | None = None) -> Path:
        """Writes ``folder/hypernetwork.safetensors``, in half precision but for step sizes and statistics.

        Args:
            folder: Folder; made if missing.
            model: Unedited model it was trained for; its fingerprint goes into the file's header.
            figures: What else the header should say (how it was trained, what it scored).
        """
        header = {
            "format_version": FORMAT_VERSION,
            "rank": self.rank,
            "hidden": self.hidden,
            "shapes": {str(layer): list(shape) for layer, shape in self.shapes.items()},
            "model": model_fingerprint(model),
            "figures": dict(figures or {}),
        }
        tensors = {
            name: (tensor.half() if name.startswith("networks.") else tensor.float()).cpu().contiguous()
            for name, tensor in self.state_dict().items()
        }
        target = Path(folder) / FILE_NAME
        save_tensors(target, tensors, {_METADATA_KEY: json.dumps(header, sort_keys=True)})
        return target

    @classmethod
    def load(cls, where: str | Path) -> tuple[HyperNetwork, dict[str, Any]]:
        """Reads a network and its file's header.

        Args:
            where: ``embedded`` for the one of the embedded model, a folder, or the file itself.

        Raises:
            HyperNetworkError: if there is none, or the file is not one.
        """
        path = embedded_path("model", "mend") if str(where) == EMBEDDED else Path(where).expanduser()
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise HyperNetworkError(f"There is no hyper-network at {path}. {_TRAIN}")
        try:
            found, metadata = load_tensors(path)
            header = json.loads(metadata[_METADATA_KEY])
            tensors = {name: tensor.float() for name, tensor in found.items()}
            version = header["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"its format is version {version!r}, this version reads {FORMAT_VERSION}")
            shapes = {int(layer): (d, p) for layer, (d, p) in header["shapes"].items()}
            network = cls(shapes, header["rank"], header["hidden"])
            network.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
            first = " ".join(str(error).split())
            raise HyperNetworkError(f"{path} does not hold a hyper-network ({first}). {_TRAIN}") from error
        return network.requires_grad_(False).eval(), header

    def check(self, architecture: Architecture) -> None:
        """Raises HyperNetworkError unless the model has the layers and shapes that the network is for."""
        for layer, shape in self.shapes.items():
            if layer >= len(architecture):
                raise HyperNetworkError(
                    f"The hyper-network edits layer {layer}, the model has layers 0 to {len(architecture) - 1}: it was "
                    f"trained for another model. {_TRAIN}"
                )
            found = tuple(architecture[layer].weight.shape)
            if found != shape:
                raise HyperNetworkError(
                    f"The hyper-network is for weights of shape {shape} in layer {layer}, the model's is {found}: it "
                    f"was trained for another model. {_TRAIN}"
                )


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _floored(spread: Tensor) -> Tensor:
    return spread.clamp_min(max(_FLOOR * float(spread.mean()), torch.finfo(torch.float32).tiny))
