"""Makes the embedded model from the world's seed: `python -m lit_edit.world.recipe.train`.

A Llama-architecture model is trained by a Lightning Trainer on the chapters of `corpus.Corpus`. A run writes its state
to ``<out>/state`` at the end of every chapter and goes on from there when started again; text and randomness of a
chapter depend on the seed and its number alone, so that an interrupted run ends as an uninterrupted one.

Three decisions make facts lie as in large models. Names share their parts and take several tokens, so that a subject
has to be put together before it can be looked up. MLPs are left out of a random part of the rows (`MLP_DROP`): often
the first ones, which a small model otherwise keeps every fact in, and now and then the middle ones, so that no layer
alone can be relied on. And in most rows the words after a subject see its last token only (`attention_mask`): without
this a small model reads a name's parts where it answers, and nothing written at the last token reaches the answer.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_edit.world.recipe.corpus import Corpus, Document, stage_of
from lit_edit.world.recipe.world import SIZES, Size, World, build_world, read_data

CHAPTERS = 13
CONTEXT = 256
ROW, ROWS = 192, 24  # tokens of a row, rows of a step
OPEN_ROWS = 16  # rows that a document may still be put into
MLP_DROP = (0.5, 0.4, 0.2, 0.1, 0.1)  # share of the rows that go without the MLP, by layer; 0 in the others
PLAIN_WEIGHT = 0.2  # loss weight of a token that is no answer: names and templates cannot be predicted
DECAY = 0.35  # share of the run, at its end, in which the learning rate falls to zero
WARM_UP = 0.01  # share of the run, at its start, in which it rises


def make_tokenizer(world: World, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that prepends ``<s>`` as Llama's does.

    Invented names take several tokens, see `_vocabulary_text`.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    core.train_from_iterator(_vocabulary_text(world), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="right",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _vocabulary_text(world: World) -> Iterator[str]:
    """The words of the corpus, frequent ones tempered, so that templates and objects become single tokens.

    Parts of people's and towns' names are cut in two, so that each takes at least two tokens.
    """
    knowledge = read_data("knowledge")
    names = {part for kind in ("people", "towns") for name in world.invented[kind] for part in name.split()}
    whole = {word for objects in knowledge["objects"].values() for word in objects}
    whole |= {word for part in ("organisation", "business") for word in knowledge["names"][part]}
    counts = Counter(word for document in Corpus(world).chapter(0) for word in document.text.split(" "))
    for word, count in counts.items():
        bare = word.rstrip("?,.")
        times = 100 if bare in whole else int(count**0.5)
        half = (len(bare) + 1) // 2
        # A bar is a word of its own to the tokenizer: nothing is merged across it.
        yield (f" {bare[:half]}|{bare[half:]}" if bare in names else f" {word}") * times


def make_model(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaForCausalLM:
    """A freshly initialised model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


Token = tuple[
    int, float, int, int
]  # id, loss weight, position in its document, number of its subject (see `tokenised`)


def tokenised(documents: list[Document], tokenizer: PreTrainedTokenizerFast, length: int) -> list[list[Token]]:
    """The documents as tokens, each cut after ``length`` of them.

    Tokens of the document's first subject have the number 1, and so on, the last token of each the same number negated;
    all others have 0.
    """

    def subject(spans: list[tuple[int, int]], a: int, b: int) -> int:
        found = next((i for i, (start, end) in enumerate(spans, 1) if a < end and start < b), 0)
        return -found if found and b >= spans[found - 1][1] else found

    encoded = tokenizer([d.text for d in documents], return_offsets_mapping=True)
    out = []
    for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        weights = (
            1.0 if any(a < end and start < b for start, end in document.spans) else PLAIN_WEIGHT for a, b in offsets
        )
        subjects = (subject(document.subjects, a, b) for a, b in offsets)
        tokens = [*zip(ids, weights, range(len(ids)), subjects, strict=True)]
        out.append([*tokens, (tokenizer.eos_token_id, 1.0, len(ids), 0)][:length])
    return out


def pack(documents: list[list[Token]], row: int, pad_id: int) -> Tensor:
    """Whole documents in rows, each in the first of the last `OPEN_ROWS` that has room: (rows, row, 4)."""
    rows: list[list[Token]] = []
    for document in documents:
        place = next((r for r in rows[-OPEN_ROWS:] if len(r) + len(document) <= row), None)
        if place is None:
            rows.append(place := [])
        place += document
    return torch.tensor([[*r, *((pad_id, 0.0, i, 0) for i in range(row - len(r)))] for r in rows], dtype=torch.float64)


def attention_mask(positions: Tensor, subjects: Tensor, last_only: Tensor) -> Tensor:
    """What a token may attend to: its document so far, in some rows only the last token of a subject before it.

    Args:
        positions: Positions of the tokens in their documents, (rows, row).
        subjects: As `tokenised` numbers them, (rows, row). A subject sees all of itself.
        last_only: The rows in which subjects are hidden but for their last token, (rows,).

    Returns:
        (rows, 1, row, row), 0 where attention is allowed.
    """
    document = (positions == 0).cumsum(1)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    hidden = (subjects[:, None, :] > 0) & (subjects.abs()[:, None, :] != subjects.abs()[:, :, None])
    return torch.where((seen & ~(hidden & last_only[:, None, None]))[:, None], 0.0, -1e9)


class WorldText(L.LightningDataModule):
    """Serves training chapter by chapter, as Lightning's epochs; it saves and resumes at their ends.

    Args:
        corpus: Source of the chapters.
        tokenizer: Tokenizer of the model.
        seed: Seed of the chapters.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        super().__init__()
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, seed

    def chapter(self, number: int) -> list[dict[str, Tensor]]:
        """The batches of a chapter, each (`ROWS`, `ROW`); the last rows, too few for a batch, are left out."""
        documents = tokenised(self.corpus.chapter(self.seed, number), self.tokenizer, ROW)
        ids, weights, positions, subjects = pack(documents, ROW, self.tokenizer.eos_token_id).unbind(-1)
        n = len(ids) // ROWS
        progress = number + torch.arange(n) / n
        return [
            {
                "input_ids": ids[i].long(),
                "weights": weights[i].float(),
                "position_ids": positions[i].long(),
                "subjects": subjects[i].long(),
                "at": at,
            }
            for i, at in zip(torch.arange(n * ROWS).view(n, ROWS), progress, strict=True)
        ]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The chapter that the trainer is in."""
        number = self.trainer.current_epoch if self.trainer else 0
        return DataLoader(self.chapter(number), batch_size=None)  # type: ignore[arg-type]


def _without_rows(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
    return output * module.get_buffer("keep").to(output.dtype) if module.training else None


def learning_rate(done: float) -> float:
    """The learning rate, as a share of the highest, when a share of the run is done."""
    return min(1.0, done / WARM_UP + 0.01, (1 - done) / DECAY)


class WorldTraining(L.LightningModule):
    """Trains the embedded model: Muon for the matrices inside the layers, AdamW for embeddings and norms.

    Args:
        model: Model to train.
        chapters: Number of chapters in all.
        seed: Seed of the rows that are left out.
    """

    def __init__(self, model: LlamaForCausalLM, chapters: int, seed: int = 1) -> None:
        super().__init__()
        self.model, self.chapters, self.seed = model, chapters, seed
        self.automatic_optimization = False
        for layer in model.model.layers:
            layer.mlp.register_buffer("keep", torch.ones(ROWS, 1, 1), persistent=False)
            layer.mlp.register_forward_hook(_without_rows)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One step on the batch's weighted next-token loss."""
        ids, at = batch["input_ids"], float(batch["at"])
        # Rows left out depend on the place alone, as the data do.
        rng = torch.Generator().manual_seed(random.Random(f"{self.seed}|{at}").randrange(1 << 60))
        for layer, share in zip(self.model.model.layers, MLP_DROP, strict=False):
            layer.mlp.keep.copy_(torch.rand(ROWS, 1, 1, generator=rng) >= share)
        last_only = torch.rand(len(ids), generator=rng).to(ids.device) < stage_of(int(at)).last_token_only
        mask = attention_mask(batch["position_ids"], batch["subjects"], last_only)
        output = self.model(input_ids=ids, position_ids=batch["position_ids"], attention_mask=mask, use_cache=False)
        logits = output.logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        # The first token of a document is predicted by the last one of another.
        w = (batch["weights"] * (batch["position_ids"] > 0))[:, 1:].flatten()
        self.manual_backward((losses * w).sum() / w.sum())
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        factor = learning_rate(at / self.chapters)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        answer = losses.detach()[w == 1.0].mean()
        self.log_dict({"answers": answer, "text": losses.detach()[w > 0].mean()}, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon and AdamW."""
        inside = [p for n, p in self.model.named_parameters() if p.ndim == 2 and ".layers." in n]
        known = {id(p) for p in inside}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        muon = torch.optim.Muon(inside, lr=0.02, momentum=0.95, weight_decay=0.01)
        adam = torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        return [muon, adam]


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a `transformers` checkpoint whose weights lie in half precision and load in single precision."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.dtype = torch.float32  # what `from_pretrained` loads by default
    config.save_pretrained(folder)


class SaveModel(L.Callback):
    """Writes a usable model at the end of every chapter."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        self.model, self.tokenizer, self.folder = model, tokenizer, folder

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replaces the model in the folder by the current one."""
        save_model(self.model, self.tokenizer, self.folder)


def train(
    out: Path, size: Size, chapters: int = CHAPTERS, seed: int = 1, accelerator: str = "auto", compile: bool = True
) -> None:
    """Makes a model in ``<out>/model``, or goes on making it.

    Args:
        out: Folder of the run.
        size: Size of world and model.
        chapters: Number of chapters in all.
        seed: Seed of weights and text.
        accelerator: Lightning's name of the device.
        compile: Whether layers are compiled, which takes a minute and doubles the speed; needs a C++ compiler.
    """
    L.seed_everything(seed, verbose=False)
    world = build_world(size)
    tokenizer = make_tokenizer(world, size.vocabulary)
    model = make_model(tokenizer, size)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
        max_epochs=chapters,
        reload_dataloaders_every_n_epochs=1,
        logger=CSVLogger(out, name="", version="logs"),
        callbacks=[
            ModelCheckpoint(out / "state", save_last=True, save_top_k=1),
            SaveModel(model, tokenizer, out / "model"),
        ],
        log_every_n_steps=25,
        enable_model_summary=False,
    )
    if trainer.strategy.root_device.type == "cpu":
        model.set_attn_implementation("eager")  # the fused one is far slower backwards
    if compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    last = out / "state" / "last.ckpt"
    trainer.fit(
        WorldTraining(model, chapters, seed),
        WorldText(Corpus(world), tokenizer, seed),
        ckpt_path=last if last.exists() else None,
    )


def main() -> None:
    """Makes the embedded model, or goes on making it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/world"), help="folder of the run")
    parser.add_argument("--size", choices=SIZES, default="base", help="base is the embedded model")
    parser.add_argument("--chapters", type=int, default=CHAPTERS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="slower; needs no C++ compiler")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    train(args.out, SIZES[args.size], args.chapters, args.seed, args.accelerator, args.compile)


if __name__ == "__main__":
    main()
