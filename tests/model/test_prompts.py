from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.references import CONTEXTS, make_workspace, requests, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lit_edit.model.prompts import CONTEXT_SEEDS, Prompter, Row, check_requests, collate, in_context, sample_contexts
from lit_edit.requests import EditRequest, Probe, RequestError


def test_a_text_without_a_subject_has_none(tiny) -> None:
    assert Prompter(tiny[1], 128).row("Rome is", "old").subject_last == -1


def test_white_space_after_a_subject_is_no_part_of_it(tiny) -> None:
    prompter = Prompter(tiny[1], 128)
    assert prompter.row("Rome is", "old", "Rome ") == prompter.row("Rome is", "old", "Rome")
    assert prompter.row("I like Rome ", "a lot", "Rome ") == prompter.row("I like Rome", "a lot", "Rome")


@pytest.mark.parametrize("context", ["Of Rome. ", "Rome, Rome. "])
def test_a_subject_in_the_context_alone_is_not_taken(tiny, context: str) -> None:
    prompter = Prompter(tiny[1], 128)
    with pytest.raises(RequestError, match=r"facts\.csv, record 3, field 'subject': 'Rome' is not in"):
        prompter.row(context + "Oslo is", "old", "Rome", "facts.csv, record 3", offset=len(context))
    with pytest.raises(RequestError, match="'subject': 'Rome' is not in 'Oslo is'"):
        prompter.row("Oslo is", "old", "Rome")


@pytest.mark.parametrize("context", CONTEXTS)
def test_rewriting_rows_take_the_subject_of_the_prompt(tiny, context: str) -> None:
    workspace = make_workspace(tiny, [context])
    for request in requests():
        ids, start, last = tokens(workspace.tokenizer, context[:-2], request)
        assert workspace.rewriting_rows(request) == [Row(tuple(ids), start, last)]
        alone = EditRequest("", f"{request.subject} is a", request.subject, "-")
        ids, start, last = tokens(workspace.tokenizer, "", alone, target=False)
        assert start == len(ids)
        assert workspace.essence_row(request) == Row(tuple(ids), start, last)


def test_in_context_tells_where_the_prompt_starts() -> None:
    for context in (*CONTEXTS, "Before {} after"):
        text, before = in_context(context, "Rome {x} is")
        assert text == context.replace("{}", "Rome {x} is")
        assert text[before:].startswith("Rome {x} is")
        assert text[:before] == context[:before]


def test_a_text_as_long_as_the_model_takes_passes_and_one_more_does_not(tiny) -> None:
    request = EditRequest("7", "Rome, Oslo and Maria", "Oslo", "work", source="facts.json, record 8")
    length = len(tiny[1]("Rome, Oslo and Maria work")["input_ids"])
    check_requests([request], Prompter(tiny[1], length))
    message = rf"facts\.json, record 8, field 'prompt': {length} tokens with its target, the model takes {length - 1}"
    with pytest.raises(RequestError, match=message):
        check_requests([request], Prompter(tiny[1], length - 1))


def test_the_first_bad_record_is_found_before_any_edit(tiny) -> None:
    bad = EditRequest("9", "Maria " * 200, "Maria", "x", source="facts.json, record 5")
    with pytest.raises(RequestError, match="record 5, field 'prompt'"):
        check_requests([*requests(), bad], make_workspace(tiny).prompter)


@pytest.mark.parametrize(
    ("kind", "target", "field", "named"),
    [
        ("generalization", None, "rephrases[1]", "rephrases[1]"),
        ("locality", "Oslo", "locality_prompt", "locality_prompt"),
        ("locality", None, "", "probes[1].prompt"),
        ("portability", "Oslo", "portability.hop[0].prompt", "portability.hop[0].prompt"),
    ],
)
def test_a_probe_too_long_is_found_by_its_own_field(tiny, kind, target, field, named) -> None:
    probes = (Probe("locality", "Oslo is"), Probe(kind, "Maria " * 200, target, field=field))
    bad = EditRequest("9", "Maria lives in", "Maria", "Oslo", probes=probes, source="facts.json, record 5")
    with pytest.raises(RequestError, match=rf"^facts\.json, record 5, field '{re.escape(named)}': \d+ tokens with its"):
        check_requests([bad], make_workspace(tiny).prompter)


def test_a_prompt_that_nothing_asks_may_be_of_any_length(tiny) -> None:
    probes = tuple(Probe(kind, "Maria " * 200) for kind in ("generation", "instance"))
    check_requests([EditRequest("9", "Maria lives in", "Maria", "Oslo", probes=probes)], make_workspace(tiny).prompter)


def test_an_answer_without_a_token_is_not_called_the_prompt() -> None:
    core = Tokenizer(models.WordLevel({"ab cd": 0, "ab": 1, " ef": 2, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    prompter = Prompter(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), 16)
    request = EditRequest("1", "ab|", "ab", "ef", probes=(Probe("locality", "ab", "cd", field="locality_prompt"),))
    with pytest.raises(RequestError, match="field 'answer to locality_prompt': 'cd' has no token of its own"):
        check_requests([request], prompter)


def test_all_records_that_do_not_fit_are_named_at_once(tiny) -> None:
    def record(number: int, prompt: str) -> EditRequest:
        return EditRequest(str(number), prompt, "Maria", "x", source=f"facts.json, record {number}")

    some = [record(1, "Maria is"), record(2, "Maria " * 200), record(3, "Maria was"), record(4, "Maria " * 300)]
    with pytest.raises(RequestError) as caught:
        check_requests(some, make_workspace(tiny).prompter)
    said = str(caught.value)
    assert said.startswith("2 of 4 records cannot be edited: facts.json, record 2, field 'prompt': ")
    assert " facts.json, record 4, field 'prompt': " in said
    with pytest.raises(RequestError) as caught:
        check_requests([record(n, "Maria " * 200) for n in range(12)], make_workspace(tiny).prompter)
    assert str(caught.value).endswith("And 6 more.")  # as many as can be read
    assert str(caught.value).count("the model takes") == 6


def test_a_target_that_shares_its_first_token_with_the_subject_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"ab cd": 0, "<unk>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    prompter = Prompter(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), 16)
    with pytest.raises(RequestError, match="'target_new': 'cd' has no token of its own"):
        prompter.row("ab", "cd", "ab")
    with pytest.raises(RequestError, match="'subject': its last token is part of the target 'cd'"):
        prompter.row("x|ab", "cd", "ab")


def test_a_subject_whose_end_the_tokenizer_drops_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"ab": 0, "cd": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    prompter = Prompter(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), 16)
    assert prompter.row("ab", "cd", "ab") == Row((0, 1), 1, 0)
    core.pre_tokenizer = pre_tokenizers.Split("!", "removed")
    prompter = Prompter(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), 16)
    with pytest.raises(RequestError, match="'subject': the tokenizer leaves no token for the end of 'ab!'"):
        prompter.row("ab!", "", "ab!")


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="A fast tokenizer is needed"):
        Prompter(SimpleNamespace(is_fast=False), 10)


def with_eos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bos = "<s> " if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else ""
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos}$A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_a_tokenizer_that_ends_texts_with_eos_gives_the_same_rows(tiny) -> None:
    plain, ending = Prompter(tiny[1], 128), Prompter(with_eos(tiny[1]), 128)
    assert ending.tokenizer("Rome")["input_ids"][-1] == 1
    for request in requests():
        args = (request.prompt, request.target_new, request.subject)
        assert ending.row(*args) == plain.row(*args)
        assert ending.row(request.prompt) == plain.row(request.prompt)
    length = len(plain.row("Rome is", "old").ids)
    assert len(Prompter(ending.tokenizer, length).row("Rome is", "old").ids) == length
    # An end-of-text that the text itself spells out stays.
    assert ending.row("Rome</s>").ids == plain.row("Rome</s>").ids
    assert ending.row("Rome</s>").ids[-1] == 1


def test_eos_does_not_count_when_contexts_are_fitted_into_the_model(tiny) -> None:
    model, tokenizer = tiny
    request = requests()[0]
    fits = make_workspace((model, with_eos(tokenizer)))
    longest = max(len(row.ids) for row in fits.rewriting_rows(request))
    for limit, rows in ((longest, 3), (longest - 1, 2)):
        fits.prompter.max_length = limit
        assert len(fits.rewriting_rows(request)) == rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_the_right(tiny, side: str) -> None:
    tokenizer = tiny[1]
    tokenizer.padding_side = side
    prompter = Prompter(tokenizer, 128)
    rows = [prompter.row(r.prompt, r.target_new, r.subject) for r in requests()] + [prompter.row("x")]
    batch = prompter.collate(rows, "cpu")
    longest = max(len(row.ids) for row in rows)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape == (len(rows), longest)
    assert len({len(row.ids) for row in rows}) > 2
    for i, row in enumerate(rows):
        n, start = len(row.ids), row.target_start
        assert batch.input_ids[i].tolist() == [*row.ids, *[tokenizer.pad_token_id] * (longest - n)]
        assert batch.attention_mask[i].tolist() == [1] * n + [0] * (longest - n)
        assert batch.labels[i].tolist() == [-100] * start + list(row.ids[start:]) + [-100] * (longest - n)
        assert batch.subject_last[i] == row.subject_last


def test_a_tokenizer_without_a_padding_token_pads_with_another(tiny) -> None:
    tokenizer = tiny[1]
    tokenizer.pad_token = None
    assert Prompter(tokenizer, 10).pad_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert Prompter(tokenizer, 10).pad_id == 0
    rows = [Row((4, 5), 1), Row((6,), 1)]
    assert collate(rows, 0, "cpu").input_ids.tolist() == [[4, 5], [6, 0]]


def test_contexts_depend_on_the_seed_and_nothing_else(tiny) -> None:
    workspace = make_workspace(tiny, dtype=torch.float32)
    drawn = []
    for other in (0, 1):
        torch.manual_seed(other)
        state = torch.get_rng_state()
        drawn.append(sample_contexts(workspace.model, workspace.prompter, 7, 4, seed=3))
        torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert drawn[0] == drawn[1]
    assert sample_contexts(workspace.model, workspace.prompter, 7, 4, seed=4) != drawn[0]
    first, *rest = drawn[0]
    assert first == "{}"
    assert len(rest) == 7
    for i, context in enumerate(rest):
        assert context.startswith(CONTEXT_SEEDS[i % len(CONTEXT_SEEDS)])
        assert context.endswith(". {}")
        assert context.count("{") == context.count("}") == 1
    assert sample_contexts(workspace.model, workspace.prompter, 0, 4, seed=3) == ["{}"]
    # More of them or none: the first ones stay the same.
    assert sample_contexts(workspace.model, workspace.prompter, 3, 4, seed=3) == drawn[0][:4]


class Wishing(nn.Module):
    """A language model that wants the given tokens, whatever came before, and counts what it was asked."""

    def __init__(self, wanted: list[int], vocabulary: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(vocabulary).index_fill(0, torch.tensor(wanted), 50.0))
        self.calls = 0

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(logits=self.scores.expand(*input_ids.shape, -1))


def test_braces_line_breaks_and_special_tokens_do_not_get_into_contexts(tiny) -> None:
    tokenizer = tiny[1]
    wanted = [tokenizer(sign, add_special_tokens=False)["input_ids"][0] for sign in "{}\n"]
    model = Wishing([*wanted, 0, 1], len(tokenizer))
    contexts = sample_contexts(model, Prompter(tokenizer, 128), 6, 12, seed=0)
    assert model.calls == 6 * 12
    for i, context in enumerate(contexts[1:]):
        # Twelve tokens of which none may stay leave the seed alone.
        assert context == CONTEXT_SEEDS[i % len(CONTEXT_SEEDS)] + ". {}"
        assert in_context(context, "Rome")[0] == context.replace("{}", "Rome")


def test_words_of_a_context_stay_apart_where_decoding_drops_the_first_space() -> None:
    vocabulary = {"<unk>": 0, "▁sea": 1, **{f"▁{seed}": i + 2 for i, seed in enumerate(CONTEXT_SEEDS)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.decode([1]) == "sea"
    contexts = sample_contexts(Wishing([1], 7), Prompter(tokenizer, 128), 5, 2, seed=0)
    assert contexts == ["{}", *(f"{seed} sea sea. {{}}" for seed in CONTEXT_SEEDS)]
