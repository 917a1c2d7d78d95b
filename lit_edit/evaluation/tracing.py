"""Causal tracing: which states of a model carry a fact (Meng et al. 2022, "Locating and Editing Factual Associations in
GPT", section 2).

The subject's embeddings are disturbed until the model no longer knows the answer; then one state of the undisturbed
run is put back at one token and layer. What that gives back of the answer's probability is the state's indirect effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.evaluation.scores import TOKENS_PER_BATCH
from lit_edit.model.hooks import change_outputs, logits_only_at
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

STATES = ("hidden state", "MLP output", "attention output")
TOKENS = (
    "first subject token",
    "middle subject token",
    "last subject token",
    "first token after",
    "further token",
    "last token",
)
"""Places in a prompt, as ROME's figure has them; of several middle or further tokens the one between is traced."""
_SUBJECT, _LAST = TOKENS[2], TOKENS[5]


@dataclass(frozen=True)
class Trace:
    """What tracing found, for one fact or as a mean over several.

    Attributes:
        clean: Probability of the answer's first token.
        corrupted: The same with the subject disturbed.
        effects: By state and by token, the gain of probability where a state of that layer is put back: a list over
            layers. Tokens that the prompts do not have are missing.
        facts: Number of facts.
    """

    clean: float
    corrupted: float
    effects: dict[str, dict[str, list[float]]]
    facts: int = 1

    def strongest(self, state: str = "MLP output", token: str = _SUBJECT) -> int:
        """The layer with the largest effect; 0 where nothing was traced."""
        found = self.effects.get(state, {}).get(token, [0.0])
        return found.index(max(found))

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return {"facts": self.facts, "clean": self.clean, "corrupted": self.corrupted, "effects": self.effects}


def mean_trace(traces: Sequence[Trace]) -> Trace:
    """The average indirect effects over facts; a token counts where a prompt has it.

    Raises:
        ValueError: If there is no trace.
    """
    if not traces:
        raise ValueError("There is no trace to average.")
    effects: dict[str, dict[str, list[float]]] = {}
    for state in traces[0].effects:
        for token in TOKENS:
            found = [trace.effects[state][token] for trace in traces if token in trace.effects[state]]
            if found:
                effects.setdefault(state, {})[token] = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    n = len(traces)
    return Trace(sum(t.clean for t in traces) / n, sum(t.corrupted for t in traces) / n, effects, n)


def subject_tokens(workspace: Workspace, request: EditRequest) -> tuple[list[int], range]:
    """The token ids of an edit prompt, and which of them are the subject's."""
    row = workspace.prompter.row(request.prompt, "", request.subject, request.source)
    _, offsets = workspace.prompter.encode(request.prompt.rstrip(" "))
    begin = request.prompt.rindex(request.subject)
    first = min((i for i, (_, end) in enumerate(offsets) if end > begin), default=row.subject_last)
    return list(row.ids), range(min(first, row.subject_last), row.subject_last + 1)


def places(n_tokens: int, subject: range) -> dict[str, int]:
    """Which token of a prompt is what; those that a prompt does not have are missing.

    Example:
        >>> places(6, range(1, 4))
        {'first subject token': 1, 'middle subject token': 2, 'last subject token': 3, 'first token after': 4, \
'last token': 5}
    """
    first, last = subject[0], subject[-1]
    found = {_SUBJECT: last, _LAST: n_tokens - 1}
    if first < last:
        found[TOKENS[0]] = first
    if last - first > 1:
        found[TOKENS[1]] = (first + last) // 2
    if last + 1 < n_tokens - 1:
        found[TOKENS[3]] = last + 1
    if last + 2 < n_tokens - 1:
        found[TOKENS[4]] = (last + 2 + n_tokens - 2) // 2
    return {token: found[token] for token in TOKENS if token in found}


@torch.no_grad()
def subject_spread(workspace: Workspace, requests: Sequence[EditRequest]) -> float:
    """Standard deviation of the embeddings of some facts' subjects, by which the noise is measured."""
    embedding = workspace.model.get_input_embeddings()  # type: ignore[operator]
    found = []
    for request in requests:
        ids, subject = subject_tokens(workspace, request)
        found.append(embedding(torch.tensor([ids[i] for i in subject], device=workspace.device)).float())
    return float(torch.cat(found).std())


@torch.no_grad()
def trace_fact(
    workspace: Workspace,
    request: EditRequest,
    spread: float,
    *,
    tokens: Sequence[str] = TOKENS,
    samples: int = 8,
    noise: float = 3.0,
    window: int = 1,
    seed: int = 0,
) -> Trace:
    """Indirect effects on the first token of a fact's true object, or of the model's own answer if none is recorded.

    Args:
        workspace: Of the unedited model, without a chat template.
        request: The fact.
        spread: As `subject_spread` gives it.
        tokens: Places to put states back at, of `TOKENS`.
        samples: Number of disturbed runs.
        noise: Standard deviation of the disturbance, in units of ``spread`` (ROME: 3).
        window: Number of neighbouring layers at which outputs of MLP and attention are put back together, around each
            layer (ROME: 10 of 48); a hidden state is put back alone.
        seed: Seed of the noise.
    """
    model, layers = workspace.model, workspace.architecture.layers
    ids, subject = subject_tokens(workspace, request)
    row = torch.tensor(ids, device=workspace.device)
    where = {token: at for token, at in places(len(ids), subject).items() if token in tokens}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    size = (samples, len(subject), embedding.embedding_dim)
    shift = (noise * spread * torch.randn(size, generator=generator)).to(row.device)
    modules: dict[str, list[nn.Module]] = {
        STATES[0]: [layer.block for layer in layers],
        STATES[1]: [layer.projection for layer in layers],
    }
    attention = [layer.attention for layer in layers]
    if all(module is not None for module in attention):
        modules[STATES[2]] = [module for module in attention if module is not None]

    def probabilities(rows: int, changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
        """Of every token after the prompt, (rows, vocabulary)."""
        every = torch.arange(rows, device=row.device)
        with change_outputs(changes, len(ids)), logits_only_at(model, every, torch.full_like(every, len(ids) - 1)):
            logits = model(input_ids=row.expand(rows, -1), use_cache=False).logits[0]
        found: Tensor = logits.float().softmax(-1)
        return found

    kept: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]) -> Callable[[Tensor], Tensor]:
        def look(output: Tensor) -> Tensor:
            kept[key] = output[0].clone()
            return output

        return look

    clean = probabilities(1, {m: keep((s, i)) for s, found in modules.items() for i, m in enumerate(found)})[0]
    if request.target_true is None:
        answer = int(clean.argmax())
    else:
        whole = workspace.prompter.row(request.prompt, request.target_true, source=request.source)
        answer = whole.ids[whole.target_start]

    def disturbed(rows: int) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        def change(output: Tensor) -> Tensor:
            out = output.clone()
            out[:, subject[0] : subject[-1] + 1] += shift.repeat(rows // samples, 1, 1).to(out.dtype)
            return out

        return {embedding: change}

    corrupted = float(probabilities(samples, disturbed(samples))[:, answer].mean())
    cells = [(token, layer) for token in where for layer in range(len(layers))]
    most = max(1, TOKENS_PER_BATCH // (samples * len(ids)))  # cells that run together
    effects: dict[str, dict[str, list[float]]] = {}
    for state, found in modules.items():
        gains = []
        for start in range(0, len(cells), most):
            part = cells[start : start + most]
            changes = disturbed(samples * len(part))
            for i, module in enumerate(found):
                rows = [k for k, (_, layer) in enumerate(part) if _near(i, layer, window if state != STATES[0] else 1)]
                if rows:
                    at = [where[part[k][0]] for k in rows]
                    changes[module] = _restored(kept[state, i], rows, at, samples)
            scores = probabilities(samples * len(part), changes)[:, answer]
            gains += (scores.reshape(len(part), samples).mean(1) - corrupted).tolist()
        for (token, _), gain in zip(cells, gains, strict=True):
            effects.setdefault(state, {}).setdefault(token, []).append(gain)
    return Trace(float(clean[answer]), corrupted, effects)


def _near(layer: int, center: int, window: int) -> bool:
    """Whether a layer is in the window around another one."""
    first = center - (window - 1) // 2
    return first <= layer < first + window


def _restored(clean: Tensor, cells: Sequence[int], at: Sequence[int], samples: int) -> Callable[[Tensor], Tensor]:
    """Puts states of the undisturbed run (tokens, d) back into the rows of some cells, at one token each."""
    rows = torch.tensor([cell * samples + j for cell in cells for j in range(samples)], device=clean.device)
    columns = torch.tensor(at, device=clean.device).repeat_interleave(samples)

    def change(output: Tensor) -> Tensor:
        return output.index_put((rows, columns), clean[columns])

    return change


def indirect_effects(workspace: Workspace, requests: Sequence[EditRequest], **how: Any) -> Trace:
    """Average indirect effects over facts that the model knows.

    Args:
        workspace: Of the unedited model.
        requests: The facts.
        **how: Settings of `trace_fact`.
    """
    spread = subject_spread(workspace, requests)
    return mean_trace([trace_fact(workspace, request, spread, **how) for request in requests])


def draw_trace(trace: Trace, axes: Sequence[Any]) -> None:
    """Draws average indirect effects as ROME's figure has them: tokens by layers, a panel for each state.

    Args:
        trace: What to draw.
        axes: Of matplotlib, one for each state traced.
    """
    most = max(max(map(max, by_token.values())) for by_token in trace.effects.values())
    for axis, (state, by_token) in zip(axes, trace.effects.items(), strict=False):
        image = axis.imshow(list(by_token.values()), aspect="auto", cmap="viridis", vmin=0, vmax=max(most, 1e-9))
        axis.set_yticks(range(len(by_token)), list(by_token))
        axis.set_xlabel("layer")
        axis.set_title(state)
        axis.figure.colorbar(image, ax=axis)


def draw(trace: Trace, path: Path) -> None:
    """Writes the figure of `draw_trace` as a PNG; the same figures give the same file."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(5.5 * len(trace.effects), 3), layout="constrained")
    draw_trace(trace, figure.subplots(1, len(trace.effects), squeeze=False)[0])
    figure.savefig(path, dpi=110, metadata={"Software": None})
