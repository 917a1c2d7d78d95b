"""From requests to token ids: context and chat templates, and the position of a subject's last token."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_edit.requests import EditRequest, RequestError, refusal

_LONGEST_LETTER = 4  # in code points, of those that can be composed into one
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


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt and before its target: ``head + prompt + tail + gap + target``.

    ``special`` says whether the tokenizer adds its own special tokens, BOS for one. The gap counts as the target's.
    """

    head: str = ""
    tail: str = ""
    gap: str = " "
    special: bool = True


def chat_frame(tokenizer: Any) -> Frame:
    """The frame that a tokenizer's chat template puts around the one message of a user.

    The template is rendered with `add_generation_prompt`, so that the target is the first the assistant says; templates
    that let a model think aloud first are asked not to (``enable_thinking=False``). What the template itself writes
    between that place and an assistant's words, Llama 2's space for instance, stands before the target. All special
    tokens are the template's: the tokenizer adds none, so there are never two BOS.

    Raises:
        ValueError: if there is no chat template, it cannot be rendered, or it does not take over a message as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The tokenizer has no chat template: leave `chat_template` out, or take the model's instruction-tuned "
            "version with the tokenizer that comes with it."
        )
    said = ("the words of a user", "Something else that is asked")

    def render(words: str, reply: str | None = None) -> str:
        messages = [{"role": "user", "content": words}]
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
        try:
            text: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply is None, enable_thinking=False
            )
        except Exception as error:  # whatever a template raises: it is a program of its own
            raise ValueError(
                f"The tokenizer's chat template cannot be rendered with one message of a user: {error}"
            ) from error
        return text

    frames = [render(words).partition(words) for words in said]
    head, found, tail = frames[0]
    if not found or any((before, after) != (head, tail) for before, _, after in frames):
        raise ValueError("The tokenizer's chat template changes the words of a user: the subject cannot be located.")
    try:
        between = render(said[0], said[1]).partition(said[0])[2].partition(said[1])[0]
    except ValueError:  # it takes no replies; then they follow directly
        between = tail
    gap = between.removeprefix(tail) if between.startswith(tail) else ""
    return Frame(head, tail, "" if gap.strip() else gap, special=False)


class Prompter:
    """Tokenises prompts, subjects and targets for one model.

    Args:
        tokenizer: A fast tokenizer of `transformers` (character offsets are needed).
        max_length: Longest text the model takes, in tokens.
        vocabulary: Number of tokens the model has embeddings for; None does not check.
        chat_template: Put every prompt, with its context, into the tokenizer's chat template as the words of a user;
            the target is the reply (see `chat_frame`).

    Raises:
        ValueError: if the tokenizer gives no character offsets, or no chat template that can be used.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, vocabulary: int | None = None, chat_template: bool = False
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "A fast tokenizer is needed: its character offsets locate the subject. Save the tokenizer again with "
                "a current `transformers`, or load it with `use_fast=True`."
            )
        self.tokenizer, self.max_length, self.vocabulary = tokenizer, max_length, vocabulary
        self.frame = chat_frame(tokenizer) if chat_template else Frame()

    @classmethod
    def of(cls, model: Any, tokenizer: Any, chat_template: bool = False) -> Prompter:
        """For a model of `transformers`: the length it takes and the tokens it knows are read off from it."""
        config: Any = getattr(model, "config", None)
        # A model that takes images, too, keeps what concerns text apart.
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        limit = getattr(text, "max_position_embeddings", None)
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        size = getattr(getattr(embeddings, "weight", None), "shape", (None,))[0]
        return cls(tokenizer, int(limit or 1_000_000), size, chat_template)

    @property
    def pad_id(self) -> int:
        """An id to pad with; padded places are masked, so any will do that the model has an embedding for."""
        for found in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if found is not None and (self.vocabulary is None or found < self.vocabulary):
                return int(found)
        return 0

    def encode(self, text: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of a text, without an EOS or the like that the tokenizer puts at its end.

        EOS would come between prompt and answer: it is no part of a prefix.

        Args:
            text: Text without a frame; none is put around it.
            special: Whether the tokenizer adds its special tokens.
        """
        encoded = self.tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids: list[int] = list(encoded["input_ids"])
        offsets: list[tuple[int, int]] = list(encoded["offset_mapping"])
        added: list[int] = list(encoded["special_tokens_mask"])
        # BOS alone is all there is of an empty text; it stays.
        while len(ids) > 1 and added[len(ids) - 1] and offsets[-1][0] == offsets[-1][1]:
            ids.pop(), offsets.pop()
        return ids, offsets

    def _layout(self, prompt: str, target: str) -> tuple[str, int, str, str]:
        """(the whole text, where the prompt starts in it, the prompt and the target as they stand there)."""
        frame = self.frame
        if not frame.special:
            prompt = prompt.strip()  # as templates do
        if target:
            prompt, target = prompt.rstrip(" "), target.lstrip(" ")
        text = frame.head + prompt + frame.tail
        return (text + frame.gap + target if target else text), len(frame.head), prompt, target

    def length(self, prompt: str, target: str = "") -> int:
        """How many tokens a prompt takes with its target and all that stands around it."""
        return len(self.encode(self._layout(prompt, target)[0], self.frame.special)[0])

    def row(
        self,
        prompt: str,
        target: str = "",
        subject: str | None = None,
        source: str = "",
        offset: int = 0,
        first: bool = False,
        fields: tuple[str, str] = ("prompt", "target_new"),
    ) -> Row:
        """Tokenises ``prompt + " " + target``, or what the chat template makes of them, as one text.

        The whole text is tokenised at once, and subject and target are found by their character offsets: pieces
        tokenised apart can differ from the pieces of the whole. Spaces where prompt and target meet count as the one.

        Args:
            prompt: Text before the target.
            target: Continuation, without leading space; may be empty.
            subject: Words to find in the prompt, at their last occurrence from ``offset`` on. Whole words go before
                parts of longer ones: of "Ira" in "Ira lives in Iraq" the first is taken.
            source: Names the record in an error.
            offset: Characters of the prompt before which the subject is not looked for (a context's length).
            first: Take the subject's first occurrence instead.
            fields: What an error calls the prompt and the target.

        Raises:
            RequestError: if the text is longer than the model takes or has tokens that it does not know, the subject
                is not in the prompt or has no token, or a token spans two of its parts in a way that leaves the target
                empty.
        """
        subject = None if subject is None else subject.rstrip()  # a space after it belongs to the next word's token
        if target and not target.strip():
            raise RequestError(f"{source or 'request'}, field '{fields[1]}': {target!r} is nothing but white space.")
        lead = 0 if self.frame.special else len(prompt) - len(prompt.lstrip())
        text, at, prompt, target = self._layout(prompt, target)
        offset = max(0, offset - lead)
        ids, offsets = self.encode(text, self.frame.special)
        self._check(ids, prompt, source, fields[0])
        start = len(ids)
        if target:
            begin = at + len(prompt) + len(self.frame.tail)
            # A token without extent, as some tokenizers make of a space before a letter in bytes, counts as well.
            start = next((i for i, (_, b) in enumerate(offsets) if b > begin), len(ids))
            if start == len(ids) or start == 0:
                raise RequestError(f"{source or 'request'}, field '{fields[1]}': {target!r} has no token of its own.")
        last = -1
        if subject is not None:
            place = _occurrence(prompt, subject, offset, first)
            if place < 0:
                raise RequestError(f"{source or 'request'}, field 'subject': {subject!r} is not in {prompt!r}.")
            last = _last_token(text, offsets, at + place, at + place + len(subject))
            if last < 0:
                raise RequestError(
                    f"{source or 'request'}, field 'subject': the tokenizer leaves no token for the end of {subject!r}."
                )
            if last >= start:
                raise RequestError(
                    f"{source or 'request'}, field 'subject': its last token is part of the target {target!r}."
                )
        return Row(tuple(ids), start, last)

    def _check(self, ids: Sequence[int], prompt: str, source: str, field: str) -> None:
        if len(ids) > self.max_length:
            raise RequestError(
                f"{source or 'request'}, field '{field}': {len(ids)} tokens with its target, the model takes "
                f"{self.max_length}: {prompt[:60]!r}..."
            )
        if not ids:
            raise RequestError(f"{source or 'request'}, field '{field}': {prompt[:60]!r} has no token.")
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise RequestError(
                f"{source or 'request'}, field '{field}': the tokenizer gives the token {token!r} the id {max(ids)}, "
                f"the model has embeddings for {self.vocabulary} tokens only. Load the model's own tokenizer, or "
                "resize the model's embeddings."
            )

    def collate(self, rows: Sequence[Row], device: torch.device | str) -> Batch:
        """`collate` with this tokenizer's padding."""
        return collate(rows, self.pad_id, device)


def check_requests(requests: Sequence[EditRequest], prompter: Prompter) -> None:
    """Tokenises every request and every probe that is scored, so that what does not fit is found before the first edit.

    Raises:
        RequestError: names the records that do not fit the model, each with the field, see `refusal`.
    """
    unknown = prompter.tokenizer.unk_token_id
    if unknown == prompter.tokenizer.eos_token_id:  # some name one token for both, and never need it for words
        unknown = None
    reasons = []
    for request in requests:
        try:
            _check_request(request, prompter, unknown)
        except RequestError as error:
            reasons.append(str(error))
    if reasons:
        raise refusal(reasons, len(requests))


def _check_request(request: EditRequest, prompter: Prompter, unknown: int | None) -> None:
    row = prompter.row(request.prompt, request.target_new, request.subject, request.source)
    parts = {"target_new": row.ids[row.target_start :], "subject": row.ids[row.subject_last :][:1]}
    for field, ids in parts.items():
        if unknown is not None and unknown in ids:
            raise RequestError(
                f"{request.source or 'request'}, field '{field}': the tokenizer knows no token for a part of "
                f"{getattr(request, field)!r} and puts {prompter.tokenizer.unk_token!r} there."
            )
    for number, probe in enumerate(request.probes):
        if probe.kind in ("generation", "instance"):  # nothing asks the model these
            continue
        field = probe.field or f"probes[{number}].prompt"
        own = probe.target not in (None, request.target_new)
        fields = (field, f"answer to {field}" if own else "target_new")
        prompter.row(probe.prompt, probe.target or request.target_new, source=request.source, fields=fields)


@torch.no_grad()
def sample_contexts(model: nn.Module, prompter: Prompter, n: int, length: int, seed: int) -> list[str]:
    """Context templates: the bare prompt ``{}`` and ``n`` generated prefixes, as MEMIT and AlphaEdit draw them.

    Prefixes start from "The", "Therefore", "Because", "I" and "You" in turn and are sampled from the model's ten most
    likely tokens. The generator is seeded and private: the same seed gives the same contexts, whatever ran before.

    Args:
        model: Causal language model.
        prompter: Tokenisation of the model.
        n: Number of generated prefixes.
        length: Length of a prefix, in tokens.
        seed: Seed of the sampling.
    """
    contexts = ["{}"]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    special = prompter.tokenizer.all_special_ids  # a tokenizer may know more of them than its model has outputs
    for i in range(n):
        # Plain text also where prompts go into a chat template: there the context is part of the user's words.
        ids = prompter.encode(CONTEXT_SEEDS[i % len(CONTEXT_SEEDS)])[0]
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


def _occurrence(text: str, words: str, offset: int, first: bool) -> int:
    """Where words stand in a text from a place on, or -1; where they are no part of a longer word if there they are."""
    found = [at for at in range(offset, len(text) - len(words) + 1) if text.startswith(words, at)] if words else []
    whole = [at for at in found if not _joined(text, at) and not _joined(text, at + len(words))]
    return next(iter((whole or found)[:: 1 if first else -1]), -1)


def _last_token(text: str, offsets: Sequence[tuple[int, int]], begin: int, end: int) -> int:
    """The token that a part of a text ends in, or -1."""
    # A tokenizer that composes a letter from its parts, or drops its marks, counts the place of the first only.
    letter = end - 1
    while letter > begin and _extends(text[letter]):
        letter -= 1
    parts = range(max(begin, end - _LONGEST_LETTER), letter)
    letter = next((at for at in parts if len(unicodedata.normalize("NFC", text[at:end])) == 1), letter)
    for last in range(end, letter, -1):
        # A letter may be several tokens (bytes) with the same offsets: the last of them ends the part.
        found = max((i for i, (a, b) in enumerate(offsets) if a < last <= b), default=-1)
        if found >= 0:
            return found
    return -1


def _joined(text: str, at: int) -> bool:
    """Whether a place is within a word or within what is seen as one character."""
    if not 0 < at < len(text):
        return False
    return _extends(text[at]) or (_in_word(text[at - 1]) and _in_word(text[at]))


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or _extends(character)


def _extends(character: str) -> bool:
    """Combining marks, the joiner of emoji, and skin tones: they belong to the character before them."""
    return unicodedata.category(character)[0] == "M" or character in "\u200d🏻🏼🏽🏾🏿"
