"""From requests to token ids: context templates, and the position of a subject's last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.requests import EditRequest, RequestError

CONTEXT_SEEDS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class Row:
    """One tokenised text: ids, where its target starts, and where its subject's last token stands.

    ``target_start`` equals ``len(ids)`` where the text has no target; ``subject_last`` is -1 where it has no subject.
    """

    ids: tuple[int, ...]
    target_start: int
    subject_last: int = -1

    def up_to_subject(self) -> Row:
        """The text cut behind its subject's last token, without target."""
        end = self.subject_last + 1
        return Row(self.ids[:end], end, self.subject_last)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows as tensors, all of shape (rows, longest) but ``subject_last`` (rows,).

    ``labels`` holds the target's ids and -100 elsewhere, unshifted: ``labels[i, t]`` is predicted from position t - 1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    subject_last: Tensor


def collate(rows: Sequence[Row], pad_id: int, device: torch.device | str) -> Batch:
    """Pads rows on the right. Right, whatever the tokenizer's setting: positions counted from the left stay put."""
    longest = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        labels[i, row.target_start : len(tokens)] = tokens[row.target_start :]
    last = torch.tensor([r.subject_last for r in rows])
    return Batch(ids.to(device), mask.to(device), labels.to(device), last.to(device))


class Prompter:
    """Tokenises prompts, subjects and targets for one model.

    Args:
        tokenizer: a fast tokenizer of `transformers` (character offsets are needed).
        max_length: the longest text the model takes, in tokens.

    Raises:
        ValueError: if the tokenizer gives no character offsets.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "A fast tokenizer is needed: its character offsets locate the subject. Save the tokenizer again with "
                "a current `transformers`, or load it with `use_fast=True`."
            )
        self.tokenizer, self.max_length = tokenizer, max_length

    @property
    def pad_id(self) -> int:
        """An id to pad with; padded places are masked, so any will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of a text, without an EOS that the tokenizer puts at its end.

        EOS would come between prompt and answer: it is no part of a prefix.
        """
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids: list[int] = list(encoded["input_ids"])
        offsets: list[tuple[int, int]] = list(encoded["offset_mapping"])
        while ids and ids[-1] == self.tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
            ids.pop(), offsets.pop()
        return ids, offsets

    def row(
        self,
        prompt: str,
        target: str = "",
        subject: str | None = None,
        source: str = "",
        offset: int = 0,
        first: bool = False,
    ) -> Row:
        """Tokenises ``prompt + " " + target`` as one text.

        The whole text is tokenised at once, and subject and target are found by their character offsets: pieces
        tokenised apart can differ from the pieces of the whole. Spaces where prompt and target meet count as the one.

        Args:
            prompt: the text before the target.
            target: the continuation, without leading space; may be empty.
            subject: located in the prompt, at its last occurrence from ``offset`` on.
            source: names the record in an error.
            offset: characters of the prompt before which the subject is not looked for (a context's length).
            first: take the subject's first occurrence instead.

        Raises:
            RequestError: if the text is longer than the model takes, the subject is not in the prompt or has no token,
                or a token spans two of its parts in a way that leaves the target empty.
        """
        subject = None if subject is None else subject.rstrip()  # a space after it belongs to the next word's token
        if target:
            prompt, target = prompt.rstrip(" "), target.lstrip(" ")
        ids, offsets = self.encode(f"{prompt} {target}" if target else prompt)
        if len(ids) > self.max_length:
            raise RequestError(
                f"{source or 'request'}, field 'prompt': {len(ids)} tokens with its target, the model takes "
                f"{self.max_length}: {prompt[:60]!r}..."
            )
        start = len(ids)
        if target:
            begin = len(prompt)
            start = next((i for i, (a, b) in enumerate(offsets) if b > begin and b > a), len(ids))
            if start == len(ids) or start == 0:
                raise RequestError(f"{source or 'request'}, field 'target_new': {target!r} has no token of its own.")
        last = -1
        if subject is not None:
            at = prompt.find(subject, offset) if first else prompt.rfind(subject)
            if at < offset:
                raise RequestError(f"{source or 'request'}, field 'subject': {subject!r} is not in {prompt!r}.")
            end = at + len(subject)
            # A letter may be several tokens (bytes) with the same offsets: the last of them ends the subject.
            last = max((i for i, (a, b) in enumerate(offsets) if a < end <= b), default=-1)
            if last < 0:
                raise RequestError(
                    f"{source or 'request'}, field 'subject': the tokenizer leaves no token for the end of {subject!r}."
                )
            if last >= start:
                raise RequestError(
                    f"{source or 'request'}, field 'subject': its last token is part of the target {target!r}."
                )
        return Row(tuple(ids), start, last)

    def collate(self, rows: Sequence[Row], device: torch.device | str) -> Batch:
        """`collate` with this tokenizer's padding."""
        return collate(rows, self.pad_id, device)


def check_requests(requests: Sequence[EditRequest], prompter: Prompter) -> None:
    """Tokenises every request once, so that what cannot be edited is found before the first edit.

    Raises:
        RequestError: names the first record that does not fit the model.
    """
    for request in requests:
        prompter.row(request.prompt, request.target_new, request.subject, request.source)


@torch.no_grad()
def sample_contexts(model: nn.Module, prompter: Prompter, n: int, length: int, seed: int) -> list[str]:
    """Context templates: the bare prompt ``{}`` and ``n`` generated prefixes, as MEMIT and AlphaEdit draw them.

    Prefixes start from "The", "Therefore", "Because", "I" and "You" in turn and are sampled from the model's ten most
    likely tokens. The generator is seeded and private: the same seed gives the same contexts, whatever ran before.

    Args:
        model: the causal language model.
        prompter: its tokenisation.
        n: number of generated prefixes.
        length: their length in tokens.
        seed: of the sampling.
    """
    contexts = ["{}"]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    special = prompter.tokenizer.all_special_ids  # a tokenizer may know more of them than its model has outputs
    for i in range(n):
        ids = list(prompter.row(CONTEXT_SEEDS[i % len(CONTEXT_SEEDS)]).ids)
        for _ in range(length):
            logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, -1].float().cpu()
            logits[[i for i in special if i < len(logits)]] = -torch.inf
            top = logits.topk(min(10, logits.numel()))
            choice = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
            ids.append(int(top.indices[choice]))
        # Decoded as a whole: some tokenizers drop the space before the first word they decode.
        words = prompter.tokenizer.decode(ids, skip_special_tokens=True)
        # Braces would be taken for a place to fill; a line break would end the sentence the prompt continues.
        contexts.append(words.replace("{", " ").replace("}", " ").replace("\n", " ").strip() + ". {}")
    return contexts


def in_context(context: str, prompt: str) -> tuple[str, int]:
    """(the prompt within a context, characters that stand before it)."""
    before = context.index("{}")
    return context[:before] + prompt + context[before + 2 :], before
