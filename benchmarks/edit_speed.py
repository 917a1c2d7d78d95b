"""What an edit costs and what it must cost: ratios within one run, medians over repeats: `make bench`.

* ``values``: v* as the package computes it (only what a change can reach, all requests of a batch together), against
  complete passes (of ten requests at most), and against the published way: one request at a time, every token through
  every block, all logits. With the time that the floating-point operations and the bytes that cannot be avoided take at
  the speed of a large matrix product and of a large copy on this machine.
* ``solve``: one request, ``W (d, 3.5 d)``: MOSE's rotation in a rational Krylov space against the SVD of the dense
  matrix, and what is lost in the objective; key-side MOSE; systems with kept factors against dense solves, as MEMIT,
  EMMET and AlphaEdit were published; what is done once per layer; and writing the weight.
* ``sequence``: solving and writing at the first edit of a sequence and at later ones, with memory of all past edits.
* ``edits``: whole edits of the embedded model by MOSE and MEMIT, the first of a sequence and the last.
* ``large``: whole edits of a random model with the shape of a published one, in bfloat16 on a GPU, or on the CPU in
  float32 where there is none; only where asked for (``--only large --large llama-3-8b qwen2.5-7b``).
* ``evaluation``: scoring the prompts and probes of many requests, with beginnings that texts share run once, against
  complete texts in padded batches; seconds, and the tokens that went through the model with their padding.

Prints tables and writes all figures as JSON.

    python benchmarks/edit_speed.py --only values --batches 1 10
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lit_edit.datamodules import CounterFactDataModule
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_edit.algebra.krylov import Preserved, procrustes_near_identity
from lit_edit.algebra.linalg import procrustes
from lit_edit.algebra.updates import Rotation
from lit_edit.api import load_editor
from lit_edit.editors import LocateThenEdit
from lit_edit.editors.keys import MeanKey
from lit_edit.editors.layers import FixedLayers
from lit_edit.editors.solvers import EMMET, MEMIT, MOSE, ROME, AlphaEdit, MOSEKey
from lit_edit.editors.solvers.preserved import PreservedGram, PreservedNullSpace
from lit_edit.editors.values import NormClamp, NormMatched, ValueOptimizer, ValueProblem
from lit_edit.evaluation.scores import TOKENS_PER_BATCH, score_targets
from lit_edit.model.edited_weight import EditedWeight
from lit_edit.model.hooks import change_outputs, logits_only_at
from lit_edit.model.loading import load_model
from lit_edit.model.prompts import Prompter, Row, sample_contexts
from lit_edit.model.workspace import Workspace
from lit_edit.requests import EditRequest
from lit_edit.session import EditSession, Preparation

PUBLISHED_SAMPLE = 3  # requests that the published way is timed on; it takes them one at a time anyway
COMPLETE_SAMPLE = 10  # requests that complete passes are timed on at most


def now() -> float:
    """The time, once all work that a GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of some work, after one call that does not count; of a single call if repeats is 1."""
    if repeats > 1:
        work()
    times = []
    for _ in range(repeats):
        start = now()
        work()
        times.append(now() - start)
    return statistics.median(times)


def peak_flops(dtype: torch.dtype = torch.float32, size: int = 1536, device: str = "cpu") -> float:
    """Floating-point operations per second of a large matrix product."""
    a = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / median_seconds(lambda: a @ a, 5)


def peak_bytes(size: int = 64_000_000, device: str = "cpu") -> float:
    """Bytes per second that a large sum reads."""
    a = torch.randn(size // 4, device=device)
    return size / median_seconds(a.sum, 5)


# Values


def models(names: list[str]) -> dict[str, tuple[nn.Module, Any, int]]:
    """(model, tokenizer, edited layer) by name."""
    found: dict[str, tuple[nn.Module, Any, int]] = {}
    embedded, tokenizer = load_model()
    for name in names:
        if name == "embedded":
            found[name] = (embedded, tokenizer, 3)
            continue
        layers, width = (int(part) for part in name.removeprefix("llama-").split("x"))
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=width, intermediate_size=int(3.5 * width), num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
        )  # fmt: skip
        torch.manual_seed(0)
        found[name] = (LlamaForCausalLM(config), tokenizer, layers * 5 // 32)  # ROME's layer of 5 among 32
    for model, _, _ in found.values():
        model.eval().requires_grad_(False)
    return found


def published(space: Workspace, request: EditRequest, layer: int, values: ValueOptimizer, steps: int) -> None:
    """v* as released code computes it: padded complete passes for one request, logits of every token."""
    rows = [*space.rewriting_rows(request), space.essence_row(request)]
    batch = space.prompter.collate(rows, space.device)
    every = torch.arange(len(rows), device=space.device)
    end = batch.attention_mask[-1].sum() - 1
    delta = torch.zeros(space.architecture[layer].weight.shape[0], device=space.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=0.5)
    before: Tensor | None = None
    start: Tensor | None = None

    def change(output: Tensor) -> Tensor:
        nonlocal start
        at = (every, batch.subject_last)
        start = output[0, batch.subject_last[0]].detach() if start is None else start
        return output.index_put(at, (output[at] + delta).to(output.dtype))

    for _ in range(steps):
        with change_outputs({space.architecture[layer].projection: change}):
            logits = space.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        log_p = logits.float().log_softmax(-1)
        wanted = batch.labels[:-1, 1:]
        picked = log_p[:-1, :-1].gather(2, wanted.clamp_min(0)[..., None])[..., 0] * (wanted != -100)
        loss = -(picked.sum(1) / (wanted != -100).sum(1)).mean()
        now = log_p[-1, end]
        before = now.detach() if before is None else before
        loss = loss + values.kl_factor * nn.functional.kl_div(before, now, log_target=True, reduction="sum")
        if start is not None:
            loss = loss + values.weight_decay * delta.norm() / start.norm() ** 2
        adam.zero_grad()
        loss.backward()
        adam.step()


def weights_above(space: Workspace, layer: int) -> int:
    """Numbers in the blocks above the edited one: where its change arrives as it is, they are all that has to run."""
    return sum(p.numel() for part in list(space.architecture.layers)[layer + 1 :] for p in part.block.parameters())


def head_weights(space: Workspace) -> int:
    """Numbers in the output embeddings."""
    return int(space.model.get_output_embeddings().weight.numel())  # type: ignore[operator]


def needed_flops(space: Workspace, requests: list[EditRequest], layer: int) -> float:
    """Per step: suffix tokens through the blocks above the edited one, forward and once back, and the logits read."""
    blocks, head, total = weights_above(space, layer), head_weights(space), 0.0
    for request in requests:
        rows = [*space.rewriting_rows(request), space.essence_row(request)]
        tokens = sum(len(row.ids) - row.subject_last for row in rows)
        read = sum(max(1, len(row.ids) - row.target_start) for row in rows)
        total += 2 * 2 * (tokens * blocks + read * head)
    return total


def needed_bytes(space: Workspace, layer: int) -> float:
    """Per step: the same blocks' weights and the head's, read forward and back."""
    size = space.architecture[layer].weight.element_size()
    return 2.0 * size * (weights_above(space, layer) + head_weights(space))


def published_flops(space: Workspace, requests: list[EditRequest], layer: int) -> float:
    """Per step: every token of padded rows through every block and the head, and back to the edited block."""
    block = sum(p.numel() for p in space.architecture[layer].block.parameters() if p.ndim == 2)
    blocks, head, total = len(space.architecture), head_weights(space), 0.0
    for request in requests:
        rows = [*space.rewriting_rows(request), space.essence_row(request)]
        tokens = len(rows) * max(len(row.ids) for row in rows)
        total += 2 * tokens * (block * (blocks + blocks - layer) + 2 * head)
    return total


def bench_values(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per edit of the three ways, by model and batch size."""
    data = CounterFactDataModule(n_edits=max(args.batches))
    data.setup("fit")
    speed, bandwidth = peak_flops(), peak_bytes()
    rows = []
    for name, (model, tokenizer, layer) in models(args.models).items():
        space = Workspace.of(model, tokenizer)
        space.contexts = sample_contexts(model, space.prompter, 5, 5, 0)
        values = ValueOptimizer(constraint=NormClamp(4.0), stop_loss=0.0)  # every problem takes every step
        for n in args.batches:
            requests = data.requests[:n]
            problems = [ValueProblem(i, (layer,)) for i in range(n)]

            def run(complete: bool, n: int, requests=requests, problems=problems, values=values, space=space) -> None:
                values.complete_passes = complete
                values.optimise(space, requests[:n], problems[:n], MeanKey(), steps=args.steps)

            few, some = requests[: min(n, PUBLISHED_SAMPLE)], min(n, COMPLETE_SAMPLE)
            repeats = 1 if n > COMPLETE_SAMPLE else args.repeats
            seconds = {
                "package": median_seconds(lambda run=run, n=n: run(False, n), repeats) / n,
                "complete passes": median_seconds(lambda run=run, some=some: run(True, some), repeats) / some,
                "published way": median_seconds(
                    lambda few=few, space=space, layer=layer, values=values: [
                        published(space, r, layer, values, args.steps) for r in few
                    ],
                    repeats,
                )
                / len(few),
            }
            least = {
                "arithmetic": needed_flops(space, requests, layer) * args.steps / n / speed,
                "memory": needed_bytes(space, layer) * args.steps / n / bandwidth,
            }
            operations = published_flops(space, requests, layer) / needed_flops(space, requests, layer)
            rows.append(
                {
                    "model": name,
                    "batch": n,
                    "operations_published_over_needed": operations,
                    "seconds_per_edit": seconds,
                    "at_peak": least,
                    "peak_gflops": speed / 1e9,
                    "peak_gbytes": bandwidth / 1e9,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


# Solvers


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A dense orthogonal matrix, from a few reflections."""
    q = torch.eye(n, dtype=torch.float64)
    for _ in range(4):
        v = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        q -= (2 / v.square().sum()) * v @ (v.T @ q)
    return q


def preserved_knowledge(n: int, generator: torch.Generator) -> Preserved:
    """Of condition number 1e6, by its eigenvectors."""
    q = orthogonal(n, generator)
    return Preserved(torch.logspace(-6, 0, n, dtype=torch.float64), q, q[:, :0])


def once(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a single call, and its result."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def bench_solve(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One request at several widths: seconds, what is lost against the dense SVD, and seconds at the machine's peak."""
    rows = []
    speed, bandwidth = peak_flops(torch.float64), peak_bytes()

    def least(operations: float, size: float) -> float:
        return max(operations / speed, size / bandwidth)

    for d in args.sizes:
        g, p = torch.Generator().manual_seed(0), int(3.5 * d)
        row: dict[str, Any] = {"d": d, "p": p}
        preserved = preserved_knowledge(d, g)
        a = preserved.vectors @ (preserved.values.sqrt()[:, None] * torch.randn(d, 1, generator=g, dtype=torch.float64))
        v = torch.randn(d, 1, generator=g, dtype=torch.float64)
        v = v / v.norm() * a.norm()
        solution = procrustes_near_identity(preserved, v, a)
        row["k"] = solution.basis.shape[1]
        row["krylov"] = median_seconds(lambda p=preserved, v=v, a=a: procrustes_near_identity(p, v, a), args.repeats)
        matrix = preserved.dense() + v @ a.T
        row["svd"], dense = once(lambda m=matrix: procrustes(m))
        best = float((dense * matrix).sum())
        row["objective_gap"] = (best - float(trace_of(solution, matrix))) / best
        row["eigenvectors"], _ = once(lambda m=matrix: torch.linalg.eigh(m + m.T))
        update, weight = Rotation(solution.turn, solution.basis), torch.randn(d, p, generator=g)
        row["write"] = median_seconds(lambda u=update, w=weight: u.apply_(w), args.repeats)
        del preserved, matrix, dense, weight
        row |= additive_solves(p, g, args.repeats)
        wide = preserved_knowledge(p, g)
        key, wanted = (torch.randn(p, 1, generator=g, dtype=torch.float64) for _ in range(2))
        row["key_side"] = median_seconds(
            lambda w=wide, k=key, t=wanted: procrustes_near_identity(w, t, k), args.repeats
        )
        del wide
        rows.append(row)
        k = row["k"]
        row["at_peak"] = {
            # The eigenvectors are read for the edit's two vectors, and for the basis, which is made orthonormal.
            "krylov": least(2 * d * d * (2 + k) + 4 * d * k * k, 2 * 8 * d * d),
            "write": least(4 * d * p * k, 2 * 4 * d * p),
            "kept": least(2 * p * p, 8 * p * p),  # half a factor, forth and back
            "alphaedit_kept": least(2 * p * p, 8 * p * p),
        }
        print(json.dumps(row), flush=True)
    return rows


def additive_solves(p: int, g: torch.Generator, repeats: int) -> dict[str, float]:
    """Seconds of a system of size p: with kept factors, densely, and what keeping them costs once."""
    q = orthogonal(p, g)
    covariance = (q * torch.logspace(-4, 0, p, dtype=torch.float64)) @ q.T
    key, site = torch.randn(p, 1, generator=g, dtype=torch.float64), EditedWeight(torch.zeros(1, p))
    found: dict[str, float] = {}
    found["factorise"], kept = once(lambda c=covariance: PreservedGram.of(c, 1.0, site))
    found["kept"] = median_seconds(lambda k=kept: k.solve(key), repeats)
    found["dense"], _ = once(lambda c=covariance: torch.linalg.solve(c + key @ key.T, key))
    del kept, covariance  # each takes gigabytes at a large model's size
    projector = q[:, : p // 2] @ q[:, : p // 2].T
    del q
    null_space = PreservedNullSpace.of(projector, 10.0, site, ())
    found["alphaedit_kept"] = median_seconds(lambda: null_space.solve(key), repeats)
    system = projector @ (key @ key.T)
    system.diagonal().add_(10.0)
    found["alphaedit_dense"], _ = once(lambda: torch.linalg.solve(system, projector @ key))
    return found


def trace_of(solution: Any, matrix: Tensor) -> Tensor:
    """``tr(Qᵀ M)`` for a thin ``Q``."""
    less = solution.turn - torch.eye(len(solution.turn), dtype=torch.float64)
    return matrix.trace() + (less * (solution.basis.T @ matrix @ solution.basis)).sum()


# Sequences


def bench_sequence(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of solving and writing around some counts of edits, at the embedded model's size."""
    d, p, rows = 320, 960, []
    g = torch.Generator().manual_seed(0)
    root = torch.randn(p, p, generator=g, dtype=torch.float64) * torch.logspace(0, -2, p).double()
    covariance = root @ root.T / p
    for solver in (
        MOSE(0.1),
        MOSEKey(1.0),
        ROME(memory=True),
        EMMET(memory=True),
        MEMIT(30.0, memory=True),
        AlphaEdit(threshold=None, energy=0.02),
    ):
        site, times = EditedWeight(torch.randn(d, p, generator=g)), []
        site.covariance = covariance
        for n in range(args.edits):
            key = root @ torch.randn(p, 1, generator=g, dtype=torch.float64) / p**0.5
            target = torch.randn(d, 1, generator=g, dtype=torch.float64)
            target = target / target.norm() * (site.exact @ key).norm()
            start = time.perf_counter()
            update = solver.solve(site, key, target)
            site.write(update)
            site.remember([n + 1], key, target)
            solver.written(site, update)
            times.append(time.perf_counter() - start)
        window = max(1, min(20, args.edits // 4))
        rows.append(
            {
                "solver": type(solver).__name__,
                "edits": args.edits,
                "first": times[0],
                "early": statistics.median(times[1 : 1 + window]),
                "late": statistics.median(times[-window:]),
                "early_mean": statistics.mean(times[1 : 1 + len(times) // 5]),  # with what is done now and then
                "late_mean": statistics.mean(times[-len(times) // 5 :]),
            }
        )
    return rows


# Whole edits


def bench_edits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of whole edits of the embedded model, by MOSE and MEMIT, at both ends of a sequence."""
    rows = []
    for method in ("mose", "memit"):
        data = CounterFactDataModule(n_edits=args.whole_edits, seed=0)
        data.setup("fit")
        model, tokenizer = load_model()
        session = EditSession(model, tokenizer, load_editor(method), Preparation(corpus_tokens=args.tokens))
        times = []
        for request in data.requests:
            start = time.perf_counter()
            session.apply(session.plan([request]))
            times.append(time.perf_counter() - start)
        window = max(1, len(times) // 10)
        rows.append(
            {
                "method": method,
                "edits": len(times),
                "early": statistics.median(times[1 : 1 + window]),
                "late": statistics.median(times[-window:]),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


# Models of the size of published ones

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32000,
    },
}  # fmt: skip


def shaped(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A random model of a shape, made where and how it is used: there is no second copy of it."""
    if name not in SHAPES:
        raise SystemExit(f"There is no shape {name!r}; there are {', '.join(SHAPES)}.")
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=512, **SHAPES[name]))
    finally:
        torch.set_default_dtype(usual)
    return model.eval().requires_grad_(False)


def bench_large(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of whole edits of one layer, by stage, with 20 contexts and 25 steps of which none is left out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    speed, bandwidth = peak_flops(dtype, 8192 if device == "cuda" else 1536, device), peak_bytes(device=device)
    data = CounterFactDataModule(n_edits=args.large_edits + 1)
    data.setup("fit")
    tokenizer, rows = load_model()[1], []
    for name in args.large:
        model = shaped(name, device, dtype)
        layer = SHAPES[name]["num_hidden_layers"] * 5 // 32  # ROME's layer of 5 among 32
        cache = tempfile.TemporaryDirectory()  # all start from the unedited model, whose statistics they share
        for solver in (MOSE(1.0), MEMIT(15_000.0), AlphaEdit()):
            constraint = NormMatched() if isinstance(solver, MOSE) else NormClamp(4.0)
            values = ValueOptimizer(constraint=constraint, stop_loss=0.0)
            editor = LocateThenEdit(FixedLayers([layer]), values, solver, contexts=20, context_length=10)
            how = Preparation(corpus_tokens=args.large_tokens, cache_dir=cache.name)
            session = EditSession(model, tokenizer, editor, how)
            method, times = type(solver).__name__, []
            for request in data.requests:
                start = now()
                session.apply(session.plan([request]))
                times.append(now() - start)
            space, first = session.workspace, data.requests[:1]
            stages = [edit.stages for edit in session.journal.edits[1:]]
            rows.append(
                {
                    "model": name,
                    "device": device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "method": method,
                    "first": times[0],
                    "edit": statistics.median(times[1:]),
                    "stages": {key: statistics.median(s[key] for s in stages) for key in sorted(stages[0])},
                    "published_values": median_seconds(
                        lambda s=space, r=first[0], v=values, at=layer: published(s, r, at, v, v.steps), 1
                    )
                    if method == "MEMIT"
                    else None,
                    "at_peak": {
                        "arithmetic": needed_flops(space, first, layer) * values.steps / speed,
                        "memory": needed_bytes(space, layer) * values.steps / bandwidth,
                    },
                    "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30
                    if device == "cuda"
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                    "model_gb": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            for site in session.sites:
                site.restore()
        cache.cleanup()
        del model, session, space
    return rows


# Evaluation


@torch.no_grad()
def score_complete(model: nn.Module, prompter: Prompter, rows: list[Row]) -> None:
    """Every token of every text, in padded batches of texts sorted by length."""
    device = next(model.parameters()).device
    group: list[Row] = []
    for row in [*sorted(rows, key=lambda row: len(row.ids)), None]:
        if group and (row is None or (len(group) + 1) * len(row.ids) > TOKENS_PER_BATCH):
            batch = prompter.collate(group, device)
            of, at = (batch.labels >= 0).nonzero(as_tuple=True)
            with logits_only_at(model, of, at - 1):
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            logits.float().log_softmax(-1)
            group = []
        if row is not None:
            group.append(row)


def bench_evaluation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds and tokens of scoring all probes of some requests, by model."""
    data = CounterFactDataModule(n_edits=args.scored)
    data.setup("fit")
    found = []
    for name, (model, tokenizer, _) in models(args.models).items():
        prompter = Prompter.of(model, tokenizer)
        rows = [prompter.row(request.prompt, request.target_new) for request in data.requests]
        rows += [
            prompter.row(probe.prompt, probe.target or request.target_new)
            for request in data.requests
            for probe in request.probes
        ]
        ran: list[int] = []
        handle = model.register_forward_pre_hook(
            lambda _, __, given, ran=ran: ran.append(given["input_ids"].numel()), with_kwargs=True
        )
        row: dict[str, Any] = {"model": name, "requests": args.scored, "texts": len(rows)}
        for way, work in (("package", score_targets), ("complete", score_complete)):
            row[way] = median_seconds(
                lambda work=work, model=model, p=prompter, rows=rows: work(model, p, rows), args.repeats
            )
            ran.clear()
            work(model, prompter, rows)
            row[f"{way}_tokens"] = sum(ran)
        handle.remove()
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


# Tables


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Markdown."""
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def show(found: dict[str, list[dict[str, Any]]], steps: int) -> None:
    """All sections as tables."""
    if rows := found.get("values"):
        print(f"Values, {steps} steps, seconds per edit\n")
        table = []
        for r in rows:
            t, least = r["seconds_per_edit"], max(r["at_peak"].values())
            table.append(
                [r["model"], str(r["batch"]), f"{t['package']:.3f}", f"{t['complete passes'] / t['package']:.1f}",
                 f"{t['published way'] / t['package']:.1f}", f"{r['operations_published_over_needed']:.1f}",
                 f"{least:.3f}", f"{t['package'] / least:.1f}"]
            )  # fmt: skip
        print_table(
            [
                "model",
                "batch",
                "package",
                "complete / package",
                "published / package",
                "operations",
                "limit",
                "package / limit",
            ],
            table,
        )
    if rows := found.get("solve"):
        print("MOSE's rotation for one request, seconds\n")
        print_table(
            ["d", "k", "Krylov", "limit", "SVD", "SVD / Krylov", "objective gap", "key side", "write", "limit",
             "eigenvectors (once)"],
            [
                [str(r["d"]), str(r["k"]), f"{r['krylov']:.4f}", f"{r['at_peak']['krylov']:.4f}", f"{r['svd']:.2f}",
                 f"{r['svd'] / r['krylov']:.0f}", f"{r['objective_gap']:.0e}", f"{r['key_side']:.3f}",
                 f"{r['write']:.3f}", f"{r['at_peak']['write']:.3f}", f"{r['eigenvectors']:.1f}"]
                for r in rows
            ],
        )  # fmt: skip
        print("Systems of additive methods for one request, seconds\n")
        print_table(
            ["p", "limit", "kept factor", "dense", "dense / kept", "AlphaEdit kept", "dense", "ratio",
             "factorise (once)"],
            [
                [str(r["p"]), f"{r['at_peak']['kept']:.4f}", f"{r['kept']:.4f}", f"{r['dense']:.2f}",
                 f"{r['dense'] / r['kept']:.0f}", f"{r['alphaedit_kept']:.4f}", f"{r['alphaedit_dense']:.2f}",
                 f"{r['alphaedit_dense'] / r['alphaedit_kept']:.0f}", f"{r['factorise']:.1f}"]
                for r in rows
            ],
        )  # fmt: skip
    if rows := found.get("sequence"):
        print(f"Solving and writing in a sequence of {rows[0]['edits']} edits with memory, milliseconds\n")
        print_table(
            ["solver", "first", "early", "late", "late / early", "early mean", "late mean", "late / early"],
            [
                [r["solver"], *(f"{1e3 * r[k]:.1f}" for k in ("first", "early", "late")),
                 f"{r['late'] / r['early']:.2f}", *(f"{1e3 * r[k]:.1f}" for k in ("early_mean", "late_mean")),
                 f"{r['late_mean'] / r['early_mean']:.2f}"]
                for r in rows
            ],
        )  # fmt: skip
    if rows := found.get("edits"):
        print("Whole edits of the embedded model, seconds\n")
        print_table(
            ["method", "edits", "early", "late", "late / early", "peak memory, MB"],
            [
                [r["method"], str(r["edits"]), f"{r['early']:.3f}", f"{r['late']:.3f}", f"{r['late'] / r['early']:.2f}",
                 f"{r['peak_memory_mb']:.0f}"]
                for r in rows
            ],
        )  # fmt: skip
    if rows := found.get("evaluation"):
        print(f"Scoring all probes of {rows[0]['requests']} requests, seconds\n")
        print_table(
            ["model", "texts", "package", "complete", "complete / package", "tokens", "complete", "ratio"],
            [
                [r["model"], str(r["texts"]), f"{r['package']:.2f}", f"{r['complete']:.2f}",
                 f"{r['complete'] / r['package']:.2f}", str(r["package_tokens"]), str(r["complete_tokens"]),
                 f"{r['complete_tokens'] / r['package_tokens']:.2f}"]
                for r in rows
            ],
        )  # fmt: skip
    if rows := found.get("large"):
        print("Whole edits of one layer, 25 steps, 20 contexts, seconds\n")
        stages = ["keys", "values", "solve", "write"]
        print_table(
            ["model", "on", "method", "edit", *stages, "published values", "limit of values", "peak, GB", "model, GB"],
            [
                [r["model"], f"{r['device']}, {r['dtype']}", r["method"], f"{r['edit']:.2f}",
                 *(f"{r['stages'].get(stage, 0):.3f}" for stage in stages),
                 "" if r["published_values"] is None else f"{r['published_values']:.2f}",
                 f"{max(r['at_peak'].values()):.3f}", f"{r['peak_memory_gb']:.1f}", f"{r['model_gb']:.1f}"]
                for r in rows
            ],
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["values", "solve", "sequence", "edits", "evaluation"])
    parser.add_argument(
        "--models", nargs="+", default=["embedded", "llama-24x512"], help="llama-<layers>x<width>: random"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--whole_edits", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=50_000, help="of the corpus, for whole edits")
    parser.add_argument("--large", nargs="+", default=["llama-3-8b", "qwen2.5-7b"], help=", ".join(SHAPES))
    parser.add_argument("--large_edits", type=int, default=5)
    parser.add_argument("--large_tokens", type=int, default=20_000, help="of the corpus, for the key covariance")
    parser.add_argument("--scored", type=int, default=100, help="requests whose probes are scored")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    args = parser.parse_args()
    sections = {
        "values": bench_values,
        "solve": bench_solve,
        "sequence": bench_sequence,
        "edits": bench_edits,
        "evaluation": bench_evaluation,
        "large": bench_large,
    }
    unknown = sorted(set(args.only) - set(sections))
    if unknown:
        raise SystemExit(f"There is no section {unknown[0]!r}; there are {', '.join(sections)}.")
    found = {name: sections[name](args) for name in args.only}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**found, "steps": args.steps, "threads": torch.get_num_threads()}, indent=1))
    show(found, args.steps)


if __name__ == "__main__":
    main()
