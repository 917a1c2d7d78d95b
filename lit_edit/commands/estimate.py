"""What editing will need, before anything heavy is done: memory from shapes alone, time from a measured batch.

Memory is what lasts (weights, statistics, what methods keep) plus the largest of what comes and goes. With the model's
width d, the projections' input size p, L editable of N blocks, vocabulary v, and texts of t tokens:

* weights: as many bytes as they have in their dtype;
* key covariances: ``8 p²`` for each of L; language-model gradients: ``8 d p``;
* original weights: as stored, for each of L that is edited, and never on a GPU; all of L are counted;
* what the solver keeps: `Solver.kept_size` numbers of 8 bytes for each of L (AlphaEdit's projector: ``p²``);
* what rounding took of edited weights of 16 bits: as much as these;
* keys and targets of past edits: ``4 (d + p)`` for each edit and layer, at most, and ``8 p`` for each in the layer being
  solved;
* while key covariances are collected: ``8 p²`` for each of L a second time, and the keys of one batch of texts;
* while gradients are collected: ``8 d p`` for each of L a second time, and, for every token of one batch of texts, what
  the backward pass keeps in each block from the lowest of L on (see below), the inputs of L, two float64 copies of the
  largest, and ``5 v`` numbers of 4 bytes: logits, their float32 copy, its softmax, and the gradients of both;
* while values are optimised: for every row (an edit prompt in a context, or the prompt of the KL term) and token what
  the backward pass keeps in each block, about ``12 d + 4 p`` numbers in the dtype (float32 where norms compute in it),
  and ``3 v`` numbers of 4 bytes for each token whose logits are read;
* while an update is solved, one layer at a time, in float64: ``24 p²`` where there is a covariance, and
  `Solver.passing_size` numbers; ``24 d p`` for restraints, and for updates that are not factors; the former weights of
  all layers written, as stored, until the batch is whole, and the one that is being written a second time;
* for methods that train copies of the weights: weight, gradient and Adam's two moments in float32, ``16 d p`` for L.

The estimate is made from shapes: the model may lie on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lit_edit.algebra.exact import can_have_remainder
from lit_edit.editors import Editor, LocateThenEdit
from lit_edit.editors.layers import ActivationSelection, FixedLayers, WilKE
from lit_edit.editors.values.optimizer import MOST_ROWS
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest

_COLLECTED_AT_ONCE = 16 * 256  # tokens in a forward pass over the corpus
_DERIVED_AT_ONCE = 4  # texts in a forward and backward pass over the corpus, of 256 tokens or what the model takes
_KEPT_OF_BLOCK = (12, 4)  # numbers for a token in units of (d, p), measured on Llama and GPT-2 blocks


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for.

    Attributes:
        lasting: there from the first to the last edit.
        passing: there for a while; of these only the largest counts.
    """

    lasting: dict[str, int]
    passing: dict[str, int]

    @property
    def kept(self) -> int:
        """Bytes that last."""
        return sum(self.lasting.values())

    @property
    def total(self) -> int:
        """Bytes at the highest."""
        return self.kept + max(self.passing.values(), default=0)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def memory_needed(
    workspace: Workspace,
    editor: Editor,
    requests: Sequence[EditRequest],
    batch_size: int,
    on_gpu: bool = False,
) -> Memory:
    """Memory of a run, from shapes alone (see the module).

    Args:
        workspace: of the model, which may lie on the meta device.
        editor: the method.
        requests: all edits of the run; their longest text counts.
        batch_size: how many are edited at once.
        on_gpu: count what lies on the GPU alone.

    Raises:
        ValueError: if the editor wants layers that the model does not have, or a request does not fit the model.
    """
    model, architecture = workspace.model, workspace.architecture
    parts = [architecture[layer] for layer in editor.editable_layers(workspace)]
    shapes = [tuple(part.weight.shape) for part in parts]
    lasting = {"weights": weight_bytes(model)}
    if editor.needs_covariances:
        lasting["key covariances"] = sum(8 * p * p for _, p in shapes)
    if editor.needs_gradients:
        lasting["language-model gradients"] = sum(8 * d * p for d, p in shapes)
    if not on_gpu:
        lasting["original weights"] = sum(p.weight.numel() * p.weight.element_size() for p in parts)
    head = model.get_output_embeddings()  # type: ignore[operator]
    vocabulary, itemsize = head.weight.shape[0], head.weight.element_size()
    stored = [part.weight.numel() * part.weight.element_size() for part in parts]
    carried = can_have_remainder(parts[0].weight.dtype)
    if carried:
        lasting["what rounding took"] = sum(stored)
    former = (sum(stored) + max(stored)) * (2 if carried else 1)
    widest = max(d * p for d, p in shapes)
    longest = max(p for _, p in shapes)
    passing = {}
    if editor.needs_covariances:
        keys = _COLLECTED_AT_ONCE * longest * (8 + 2 * itemsize)
        passing["collecting statistics"] = lasting["key covariances"] + keys
    if editor.needs_gradients:
        passing["collecting gradients"] = lasting["language-model gradients"] + _collecting_gradients(
            workspace, editor.editable_layers(workspace), longest, vocabulary, itemsize
        )
    if isinstance(editor, LocateThenEdit):
        solvers = [editor.solver, *([editor.layers.solver] if isinstance(editor.layers, WilKE) else [])]
        for role, solver in zip(("keeps", "keeps to choose layers"), solvers, strict=False):
            if kept := sum(8 * solver.kept_size(d, p) for d, p in shapes):
                lasting[f"what {type(solver).__name__} {role}"] = kept
        lasting["keys and targets of past edits"] = sum(4 * (d + p) * len(requests) for d, p in shapes)
        squares = 3 * longest**2 if editor.solver.needs_covariance else 0
        dense = max(3 * widest if editor.restraints else 0, max(editor.solver.passing_size(d, p) for d, p in shapes))
        passing["solving"] = 8 * (dense + squares + 2 * longest * len(requests)) + former
        passing["values"] = _values(workspace, editor, requests, batch_size, vocabulary, itemsize)
    else:
        lasting["trained copies of weights"] = sum(16 * d * p for d, p in shapes)
        passing["training"] = _passes(workspace, batch_size, *_text(workspace, requests), vocabulary, itemsize, 1.0)
        passing["writing"] = 8 * 3 * widest + former
    return Memory(lasting, passing)


def _collecting_gradients(
    workspace: Workspace, layers: Sequence[int], longest: int, vocabulary: int, itemsize: int
) -> int:
    """Bytes of one forward and backward pass over texts of the corpus, every token of which is predicted."""
    tokens, blocks = min(256, workspace.prompter.max_length), len(workspace.architecture)
    above = (blocks - min(layers)) / blocks
    kept = _passes(workspace, _DERIVED_AT_ONCE, tokens, 0, vocabulary, itemsize, above)
    of_token = longest * (itemsize * len(layers) + 8 * 2) + vocabulary * 5 * 4
    return kept + _DERIVED_AT_ONCE * tokens * of_token


def _values(
    workspace: Workspace,
    editor: LocateThenEdit,
    requests: Sequence[EditRequest],
    batch_size: int,
    vocabulary: int,
    itemsize: int,
) -> int:
    """Bytes of the larger one of the optimisations for choosing layers and for the values themselves."""
    contexts, length = editor.context_sampling
    tokens, target = _text(workspace, requests)
    batch, kl = min(batch_size, len(requests)), int(bool(editor.values.kl_factor))
    layers = editor.editable_layers(workspace)
    policy, blocks = editor.layers, len(workspace.architecture)
    above = (blocks - (layers[-1] if editor.values.site == "block" else layers[0])) / blocks
    most = max(editor.values.max_rows or MOST_ROWS, contexts + 1 + kl)
    rows = min(batch * (contexts + 1 + kl), most)
    found = _passes(workspace, rows, tokens + (length if contexts else 0), target, vocabulary, itemsize, above)
    if isinstance(policy, FixedLayers):
        return found
    tried = min(policy.contexts, contexts + 1) if isinstance(policy, ActivationSelection) else contexts + 1
    above = sum(blocks - layer for layer in layers) / len(layers) / blocks
    rows = min(batch * len(layers) * (tried + kl), most)
    tokens += length if tried > 1 else 0
    return max(found, _passes(workspace, rows, tokens, target, vocabulary, itemsize, above))


def _text(workspace: Workspace, requests: Sequence[EditRequest]) -> tuple[int, int]:
    """Tokens of the longest edit prompt with its target, and of the longest target."""
    rows = [workspace.prompter.row(r.prompt, r.target_new, r.subject, r.source) for r in requests]
    return max(len(row.ids) for row in rows), max(len(row.ids) - row.target_start for row in rows)


def _passes(
    workspace: Workspace, rows: int, tokens: int, read: int, vocabulary: int, itemsize: int, above: float
) -> int:
    """Bytes that a backward pass keeps of rows of text, through a share of the blocks."""
    d, p = workspace.architecture[0].weight.shape
    of_d, of_p = _KEPT_OF_BLOCK
    block = of_d * d * max(4, itemsize) + of_p * p * itemsize
    return round(rows * (tokens * above * len(workspace.architecture) * block + read * vocabulary * 3 * 4))


@dataclass(frozen=True)
class Time:
    """Seconds of a run by what they go to; what was not measured is not in it."""

    preparing: dict[str, float]
    editing: dict[str, float]
    measuring: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(sum(part.values()) for part in (self.preparing, self.editing, self.measuring))


def editing_time(
    first: Mapping[str, float], later: Mapping[str, float], n_edits: int, batch_size: int
) -> dict[str, float]:
    """Seconds of all edits by stage.

    Args:
        first: seconds per edit in the first batch, in which some methods do what they do only once.
        later: seconds per edit in a batch after it.
        n_edits: how many edits.
        batch_size: how many are edited at once.
    """
    at_first = min(batch_size, n_edits)
    return {
        stage: first.get(stage, 0.0) * at_first + later.get(stage, 0.0) * (n_edits - at_first)
        for stage in dict.fromkeys([*first, *later])
    }


def questions_asked(
    n_edits: int, batch_size: int, every_n: int | Sequence[int], at_start: bool = True, at_end: bool = True
) -> int:
    """How many requests a `lit_edit.callbacks.Retention` scores along a run, each as often as it is scored.

    The counts to measure at are those of `lit_edit.callbacks.EveryNEdits`; all requests are asked before the first
    edit.
    """
    asked, last = n_edits if at_start else 0, 0
    for edits in range(batch_size, n_edits + batch_size, batch_size):
        edits = min(edits, n_edits)
        if isinstance(every_n, int):
            due = edits // every_n > last // every_n
        else:
            due = any(last < count <= edits for count in every_n)
        if due or (at_end and edits == n_edits):
            asked += edits
            last = edits
    return asked


def size_text(size: float) -> str:
    """Bytes for people: ``850 kB``, ``1.2 GB``."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def time_text(seconds: float) -> str:
    """Seconds for people: ``0.4 s``, ``12 min``, ``3.4 h``."""
    if seconds < 0.01:
        return "< 0.01 s"
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    minutes = seconds / 60
    return f"{minutes:.2g} min" if minutes < 99.5 else f"{minutes / 60:.3g} h"
