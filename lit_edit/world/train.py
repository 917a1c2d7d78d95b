"""The recipe of the embedded model: `python -m lit_edit.world.train` makes tokenizer and model from the world's seed.

A Llama-architecture model of eight layers is trained by a Lightning Trainer on documents drawn by `corpus.Corpus`.
A run writes its state to ``<out>/train`` and goes on from there when started again; the data of every step depends on
the seed and the step's number alone, so that an interrupted run sees what an uninterrupted one would have seen.

Two decisions make layer selection meaningful on a model this small. Names share their parts and take several tokens,
so a subject has to be put together before it can be looked up. And in training the MLPs of the first layers are left
out of a random part of the rows (`EARLY_MLP_DROP`): a model of this size otherwise keeps every fact in its first MLP.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_edit.world.corpus import Corpus, Document
from lit_edit.world.relations import build_world

VOCABULARY = 1200
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 320, 768, 8, 8, 4
CONTEXT = 256
ROW, ROWS = 128, 32
CHAPTER = 250
# The steps from which the corpus is in stage 1, 2 and 3.
STAGES = (7 * CHAPTER, 8 * CHAPTER, 10 * CHAPTER)
# From here on documents stay whole: rows twice as long, no document cut at a row's end or attending to another.
WHOLE = 9 * CHAPTER
EARLY_MLP_DROP = (0.5, 0.4, 0.2)
PLAIN_WEIGHT = 0.2  # loss weight of a token that is no answer: names and templates cannot be predicted


def make_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the corpus; prepends ``<s>`` as Llama's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    core.train_from_iterator(corpus.texts(40_000, seed=0), trainer)
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


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model of the embedded architecture."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class StepDataset(Dataset[dict[str, Tensor]]):
    """Item i is the whole batch of step ``first + i``: packed rows of documents drawn with the seed (seed, step)."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, first: int, length: int, seed: int) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        self.first, self.length, self.seed = first, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids`` and loss ``weights``, both (ROWS, ROW), and the ``step``."""
        step = self.first + index
        rng = random.Random(f"{self.seed}|{step}")
        stage = sum(step >= start for start in STAGES)
        whole = step >= WHOLE
        row = 2 * ROW if whole else ROW
        rows: list[list[tuple[int, float, int]]] = [[]]  # id, weight and position in its document
        while len(rows) * row <= ROW * ROWS:
            for document in self._tokenised([self.corpus.document(rng, stage) for _ in range(64)]):
                if whole:  # a document that does not fit goes to the next row
                    if len(rows[-1]) + len(document) > row:
                        rows.append([])
                    rows[-1] += document[:row]
                    continue
                rows[-1] += document
                while len(rows[-1]) > row:
                    rows.append(rows[-1][row:])
                    del rows[-2][row:]
        rows = rows[: ROW * ROWS // row]
        padded = [[*r, *((self.tokenizer.eos_token_id, 0.0, i) for i in range(row - len(r)))] for r in rows]
        ids, weights, positions = torch.tensor(padded, dtype=torch.float64).unbind(-1)
        batch = {"input_ids": ids.long(), "weights": weights.float(), "step": torch.tensor(step)}
        if whole:
            batch["position_ids"] = positions.long()
        return batch

    def _tokenised(self, documents: list[Document]) -> list[list[tuple[int, float, int]]]:
        encoded = self.tokenizer([d.text for d in documents], return_offsets_mapping=True)
        out = []
        for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            weights = [
                1.0 if any(a < end and start < b for start, end in document.spans) else PLAIN_WEIGHT for a, b in offsets
            ]
            tokens = zip((*ids, self.tokenizer.eos_token_id), (*weights, 1.0), range(len(ids) + 1), strict=True)
            out.append(list(tokens))
        return out


class WorldText(L.LightningDataModule):
    """Serves training in chapters of `CHAPTER` steps; Lightning saves and resumes at their ends."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        super().__init__()
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, seed

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The steps of the chapter that the trainer is in."""
        first = (self.trainer.current_epoch if self.trainer else 0) * CHAPTER
        data = StepDataset(self.corpus, self.tokenizer, first, CHAPTER, self.seed)
        return DataLoader(data, batch_size=None)


def _drop_rows(p: float) -> Any:
    def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        keep = torch.rand(output.shape[0], 1, 1, device=output.device) >= p
        return output * keep.to(output.dtype)

    return hook


class WorldTraining(L.LightningModule):
    """Trains the embedded model: Muon for the matrices inside the layers, AdamW for embeddings and norms.

    Args:
        model: the model to train.
        steps: in all; the learning rate is constant after a short warm-up and falls to zero over the last part.
        decay: that last part's share.
    """

    def __init__(self, model: LlamaForCausalLM, steps: int, decay: float = 0.35) -> None:
        super().__init__()
        self.model, self.steps, self.decay = model, steps, decay
        self.automatic_optimization = False
        for layer, p in zip(model.model.layers, EARLY_MLP_DROP, strict=False):
            layer.mlp.register_forward_hook(_drop_rows(p))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One step on the batch's weighted next-token loss."""
        ids, weights, step = batch["input_ids"], batch["weights"], int(batch["step"])
        torch.manual_seed(step)  # rows left out depend on the step alone, as the data does
        # Positions that start anew at every document keep attention within it; without them a row is one text.
        output = self.model(input_ids=ids, position_ids=batch.get("position_ids"), use_cache=False)
        logits = output.logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        w = weights[:, 1:].flatten()
        self.manual_backward((losses * w).sum() / w.sum())
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        remaining = (self.steps - step) / (self.decay * self.steps)
        factor = min(1.0, (step + 1) / 100, remaining)
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


def main() -> None:
    """Makes the embedded model, or goes on making it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/world"), help="folder of the run")
    parser.add_argument("--chapters", type=int, default=13, help=f"chapters of {CHAPTER} steps of {ROW * ROWS} tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    L.seed_everything(args.seed, verbose=False)
    corpus = Corpus(build_world())
    tokenizer = make_tokenizer(corpus)
    model = make_model(tokenizer)
    checkpoint = ModelCheckpoint(args.out / "state", save_last=True, save_top_k=1)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision="bf16-mixed",
        max_epochs=args.chapters,
        reload_dataloaders_every_n_epochs=1,
        logger=CSVLogger(args.out, name="", version="logs"),
        callbacks=[checkpoint, SaveModel(model, tokenizer, args.out / "model")],
        log_every_n_steps=25,
        enable_model_summary=False,
    )
    last = args.out / "state" / "last.ckpt"
    trainer.fit(
        WorldTraining(model, args.chapters * CHAPTER),
        WorldText(corpus, tokenizer, args.seed),
        ckpt_path=last if last.exists() else None,
    )


if __name__ == "__main__":
    main()
