"""Prompts, subjects and targets through real tokenizers of every common kind, small and trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.references import CONTEXTS, requests, weights
from helpers.runs import TEXTS as CORPUS
from helpers.runs import data, one_layer_editor, trainer, write_corpus
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lit_edit.callbacks import DownstreamEval, Retention
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lit_edit import EditRequest, LitEdit, edit
from lit_edit.evaluation.evaluate import Reference, evaluate, figures
from lit_edit.evaluation.scores import greedy, score_targets
from lit_edit.model.families import Architecture
from lit_edit.model.prompts import Prompter, check_requests, in_context
from lit_edit.model.workspace import Workspace
from lit_edit.requests import Probe, RequestError
from lit_edit.session import EditSession, Preparation

few = settings(max_examples=20, derandomize=True, deadline=None, database=None)
TEXTS = (
    "The capital of France is Paris.",
    "Maria was born in Oslo and works in Rome.",
    "東京 is a city. Москва is a city, too.",
    "Of the seas and the lakes, the lake is the older.",
)


def saved(core: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **special)


def framed(core: Tokenizer, before: str, after: str) -> None:
    """A post-processor that puts special tokens around every text."""
    names = [name for name in (before, after) if name]
    core.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[(name, core.token_to_id(name)) for name in names]
    )


def byte_level(
    before: str = "", after: str = "", prefix_space: bool = False, trim: bool = False, normalizer: Any = None
) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    if before or after:
        framed(core, before, after)
    elif trim:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    return saved(core, bos_token="<s>", eos_token="</s>")


def sentence_piece(before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: a space becomes ``▁``, one is put in front, unknown letters become bytes."""
    names = [f"<0x{i:02X}>" for i in range(256)]
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<unk>", "<s>", "</s>", *names], show_progress=False)
    core.train_from_iterator(TEXTS[:2] + TEXTS[3:], trainer)
    # The bytes had to be special for the trainer and are ordinary tokens in such tokenizers.
    plain = json.loads(core.to_str())
    plain["added_tokens"], plain["pre_tokenizer"] = plain["added_tokens"][:3], None
    core = Tokenizer.from_str(json.dumps(plain))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if before or after:
        framed(core, before, after)
    return saved(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """As T5 and XLNet have it; Gemma's differs in its model only."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return saved(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT has it, with tokens at both ends that are neither BOS nor EOS by name."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=130, special_tokens=special, show_progress=False)
    )
    framed(core, "[CLS]", "[SEP]")
    return saved(core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


MADE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level, BOS": lambda: byte_level("<s>"),
    "byte-level, BOS and EOS": lambda: byte_level("<s>", "</s>"),
    "byte-level, EOS": lambda: byte_level("", "</s>"),
    "byte-level, prefix space": lambda: byte_level(prefix_space=True),
    "byte-level, trimmed": lambda: byte_level(trim=True),
    "SentencePiece": sentence_piece,
    "SentencePiece, BOS": lambda: sentence_piece("<s>"),
    "SentencePiece, BOS and EOS": lambda: sentence_piece("<s>", "</s>"),
    "Unigram": unigram,
    "WordPiece": word_piece,
}
LOSSLESS = [name for name in MADE if name not in ("Unigram", "WordPiece")]


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return MADE[kind]()


def decoded(tokenizer: Any, ids: Any) -> str:
    """What ids say, without the space that some tokenizers put in front of everything."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).removeprefix(" ")


SUBJECTS = (
    "Maria", "Maria of France", "C++", "a.b*c", "f(x)", "{x}", "{}", "[a-z]+$", "\\d", "Москва", "東京", "São Paulo",
    "Jose\u0301", "e\u0301", "नमस्ते", "👩‍🚀", "🍕", "👍🏽", "Ro|me", "O'Neil", "x", "1984", "مصر", "한국",
)  # fmt: skip
WORDS = ("The", "capital", "of", "is", "born", "in", "lakes", "漢字", "ω", "and,", "so:", "7", "🌍", "Romeo", "Marian")
words = st.lists(st.sampled_from(WORDS), max_size=5)


@pytest.mark.parametrize("kind", LOSSLESS)
@given(
    before=words, subject=st.sampled_from(SUBJECTS), after=words, target=st.lists(st.sampled_from(WORDS), min_size=1),
    again=st.booleans(), context=st.sampled_from(("", "Maria, x and 東京. ")), spaces=st.sampled_from(("", " ", "   ")),
)  # fmt: skip
@example(before=[], subject="東京", after=[], target=["🌍"], again=True, context="", spaces=" ")
@example(before=["of"], subject="e\u0301", after=["漢字"], target=["漢字"], again=False, context="", spaces="")
@few
def test_what_a_row_says_is_what_was_asked(
    kind: str, before: list[str], subject: str, after: list[str], target: list[str], again: bool, context: str,
    spaces: str,
) -> None:  # fmt: skip
    tokenizer = tokenizer_of(kind)
    head = context + " ".join([*([subject] if again else []), *before, subject])
    prompt, answer = " ".join([head, *after]), " ".join(target)
    whole = f"{prompt} {answer}"
    prompter = Prompter(tokenizer, 512)
    row = prompter.row(prompt + spaces, spaces + answer, subject, offset=len(context))
    ids = tokenizer(whole)["input_ids"]
    assert list(row.ids) == (ids[:-1] if kind.endswith("EOS") else ids)
    assert decoded(tokenizer, row.ids[: row.subject_last + 1]) == head
    assert decoded(tokenizer, row.ids[: row.target_start]) == prompt
    assert decoded(tokenizer, row.ids) == whole
    assert decoded(tokenizer, row.ids[row.target_start :]) == answer
    assert prompter.row(prompt).ids == row.ids[: row.target_start]
    assert row.up_to_subject().ids == row.ids[: row.subject_last + 1]
    assert prompter.length(prompt, answer) == len(row.ids)
    bos = row.ids.count(tokenizer.bos_token_id)
    assert bos == (", BOS" in kind)


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece"])
@pytest.mark.parametrize("prompt", ["Maria was born in", "The capital of Maria is", "works of Maria Maria"])
@pytest.mark.parametrize("target", ["Rome", "Oslo and Paris"])
def test_tokenizers_that_lose_what_they_do_not_know(kind: str, prompt: str, target: str) -> None:
    tokenizer = tokenizer_of(kind)
    row = Prompter(tokenizer, 512).row(prompt, target, "Maria")
    head = prompt[: prompt.rindex("Maria") + len("Maria")]
    assert decoded(tokenizer, row.ids[: row.subject_last + 1]) == head
    assert decoded(tokenizer, row.ids[: row.target_start]) == prompt
    assert decoded(tokenizer, row.ids[row.target_start :]) == target
    assert tokenizer.sep_token_id is None or tokenizer.sep_token_id not in row.ids  # it would come before an answer


@pytest.mark.parametrize(("kind", "unknown"), [("Unigram", "<unk>"), ("WordPiece", "[UNK]")])
def test_words_without_a_token_are_reported_before_the_first_edit(kind: str, unknown: str) -> None:
    prompter = Prompter(tokenizer_of(kind), 512)
    good = EditRequest("1", "Maria was born in", "Maria", "Rome")
    check_requests([good], prompter)
    bad = EditRequest("2", "Maria was born in", "Maria", "🍕", source="facts.csv, record 2")
    with pytest.raises(RequestError, match=r"facts\.csv, record 2, field 'target_new': the tokenizer knows no token"):
        check_requests([good, bad], prompter)
    with pytest.raises(RequestError, match=r"field 'subject': .* part of '🍕' and puts '.*unk.*'|'\[UNK\]' there"):
        check_requests([EditRequest("3", "🍕 was born in", "🍕", "Rome")], prompter)
    assert unknown in tokenizer_of(kind).all_special_tokens


@pytest.mark.parametrize("normalizer", ["NFC", "NFKC", "NFD", "StripAccents"])
@pytest.mark.parametrize("subject", ["Jose\u0301", "José", "\u1112\u1161\u11ab", "e\u0323\u0302", "Maria"])
@pytest.mark.parametrize("after", ["", " was born in"])
def test_letters_that_are_composed_or_taken_apart_are_found(normalizer: str, subject: str, after: str) -> None:
    core = getattr(normalizers, normalizer)()
    if normalizer == "StripAccents":
        core = normalizers.Sequence([normalizers.NFD(), core])
    tokenizer = byte_level(normalizer=core)
    row = Prompter(tokenizer, 512).row(f"The city of {subject}{after}", "Rome", subject)
    head = tokenizer.backend_tokenizer.normalizer.normalize_str(f"The city of {subject}")
    assert decoded(tokenizer, row.ids[: row.subject_last + 1]) == head
    assert decoded(tokenizer, row.ids[row.target_start :]) == "Rome"


@pytest.mark.parametrize(
    ("prompt", "subject", "at"),
    [
        ("Ira lives in Iraq, where", "Ira", 0),
        ("In Iraq Ira lives, says Ira, near Iraqis", "Ira", 24),
        ("Romeo and Rome's Romeo", "Rome", 10),
        ("Romeo is the Romeo", "Rome", 13),  # no occurrence stands alone: the last
        ("東京と言えば、東京は", "東京", 7),
        ("C is not C++ and not C_x", "C", 9),
        ("Jose and Jose\u0301", "Jose", 0),
        ("👩 and 👩‍🚀", "👩", 0),
        ("👍 and 👍🏽", "👍", 0),
        ("Anna-Maria and Maria-Anna", "Maria", 15),
        ("x.y and xxy", "x.y", 0),
        ("Is {} in {}?", "{}", 9),
        ("aa aaa", "aa", 0),
        ("2024 and 20240", "2024", 0),
    ],
)
def test_an_occurrence_of_its_own_goes_before_one_within_a_word(prompt: str, subject: str, at: int) -> None:
    tokenizer = tokenizer_of("byte-level")
    for context in ("{}", f"Of {subject}. {{}}" if "{" not in subject else "Of old. {}"):
        text, before = in_context(context, prompt)
        row = Prompter(tokenizer, 512).row(text, "Oslo", subject, offset=before)
        end = text[: before + at + len(subject)]
        assert decoded(tokenizer, row.ids[: row.subject_last + 1]).startswith(end)
        assert not decoded(tokenizer, row.ids[: row.subject_last]).startswith(end)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("blank", [" ", "\n", "\u3000 "])
def test_a_target_of_white_space_is_refused(kind: str, blank: str) -> None:
    with pytest.raises(RequestError, match=r"'target_new': .* is nothing but white space"):
        Prompter(tokenizer_of(kind), 512).row("Maria was", blank, "Maria", "facts.csv, record 1")


def test_an_empty_text_is_refused_unless_a_special_token_stands_for_it() -> None:
    with pytest.raises(RequestError, match="field 'prompt': '' has no token"):
        Prompter(tokenizer_of("byte-level"), 512).row("")
    assert len(Prompter(tokenizer_of("byte-level, BOS"), 512).row("").ids) == 1
    with pytest.raises(RequestError, match="'Rome' has no token of its own"):
        Prompter(tokenizer_of("byte-level"), 512).row("", "Rome")


def test_settings_kept_in_a_tokenizers_file_do_not_cut_or_pad() -> None:
    tokenizer = byte_level("<s>")
    expected = Prompter(tokenizer, 512).row("The capital of France is", "Rome", "France")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40, pad_id=1, pad_token="</s>", direction="left")
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    assert Prompter(tokenizer, 512).row("The capital of France is", "Rome", "France") == expected


def test_a_token_that_the_model_does_not_know_is_reported_and_never_padded_with() -> None:
    model, tokenizer = tiny_model("gpt2")
    fits = Prompter.of(model, tokenizer)
    assert (fits.max_length, fits.vocabulary) == (128, len(tokenizer))
    tokenizer.add_tokens(["Oslo"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    prompter = Prompter.of(model, tokenizer)
    assert tokenizer.pad_token_id >= model.config.vocab_size
    assert prompter.pad_id == tokenizer.eos_token_id
    facts = requests()[:3]
    assert score_targets(model, prompter, [prompter.row(r.prompt, "Rome") for r in facts]).log_prob.isfinite().all()
    with pytest.raises(
        RequestError, match=rf"gives the token 'Oslo' the id \d+, the model has embeddings for {fits.vocabulary}"
    ):
        check_requests([EditRequest("1", "Maria was born in", "Maria", "Oslo")], prompter)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "falcon"])
def test_scores_depend_neither_on_the_padding_side_nor_on_the_batch(kind: str) -> None:
    model, tokenizer = tiny_model(kind)
    model.double()
    prompter = Prompter.of(model, tokenizer)
    rows = [prompter.row(r.prompt, r.target_new, r.subject) for r in requests()]
    alone = torch.cat([score_targets(model, prompter, [row]).log_prob for row in rows])
    answers = [greedy(model, prompter, [r.prompt], [4])[0] for r in requests()]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        torch.testing.assert_close(score_targets(model, prompter, rows).log_prob, alone, rtol=1e-6, atol=1e-6)
        assert greedy(model, prompter, [r.prompt for r in requests()], [4] * len(rows)) == answers


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "with BOS, trimming": (
        "<s>{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
    ),
    "Llama 2": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    ),
    "thinking": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
    ),
    "one message only": (
        "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}"
        "<s>Q: {{ messages[0].content }}\nA:"
    ),
}
each_template = pytest.mark.parametrize("template", list(TEMPLATES))


def chatting(template: str, bos: str = "<s>", sentence: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = sentence_piece(bos) if sentence else byte_level(bos)
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


@each_template
@pytest.mark.parametrize("sentence", [False, True])
def test_a_row_is_what_the_chat_template_makes_of_it(template: str, sentence: bool) -> None:
    tokenizer = chatting(template, sentence=sentence)
    prompter = Prompter(tokenizer, 512, chat_template=True)
    for request in requests():
        for context in CONTEXTS:
            text, before = in_context(context, request.prompt)
            row = prompter.row(text, request.target_new, request.subject, offset=before)
            asked = [{"role": "user", "content": text}]
            given = tokenizer.apply_chat_template(
                asked, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            ids = tokenizer(given, add_special_tokens=False)["input_ids"]
            assert list(row.ids[: row.target_start]) == list(prompter.row(text + " ").ids) == ids
            assert row.ids.count(tokenizer.bos_token_id) == given.count("<s>") <= 1  # the tokenizer adds none
            assert decoded(tokenizer, row.ids[row.target_start :]) == request.target_new
            end = before + request.prompt.rindex(request.subject) + len(request.subject)
            assert decoded(tokenizer, row.ids[: row.subject_last + 1]).endswith(text[:end])
            assert len(row.ids) == prompter.length(text, request.target_new)


def test_what_a_template_writes_before_a_reply_stands_before_the_target() -> None:
    tokenizer = chatting("Llama 2", sentence=True)
    row = Prompter(tokenizer, 512, chat_template=True).row("Maria was born in", "Rome", "Maria")
    said = [{"role": "user", "content": "Maria was born in"}, {"role": "assistant", "content": "Rome"}]
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert list(row.ids) == expected[: len(row.ids)]
    assert tokenizer.convert_ids_to_tokens(row.ids[row.target_start])[0] == "▁"


def test_the_target_follows_the_generation_prompt_directly() -> None:
    tokenizer = chatting("ChatML")
    row = Prompter(tokenizer, 512, chat_template=True).row(" Maria was born in ", " Rome", "Maria")
    assert tokenizer.decode(row.ids) == ("<|im_start|>user\nMaria was born in<|im_end|>\n<|im_start|>assistant\nRome")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the words of a user"),
        ("{{ messages | length }}", "changes the words of a user"),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}", "changes the words of a user"),
        ("{{ raise_exception('a system message is needed') }}", "cannot be rendered .* a system message is needed"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(template: str | None, message: str) -> None:
    tokenizer = byte_level("<s>")
    tokenizer.chat_template = template
    Prompter(tokenizer, 512)
    with pytest.raises(ValueError, match=message):
        Prompter(tokenizer, 512, chat_template=True)


FACTS = [
    EditRequest(
        "1", "The capital of France is", "France", "Oslo",
        probes=(Probe("generalization", "France has the capital"), Probe("locality", "Maria was born in", "Rome")),
    ),
    EditRequest("2", "Maria was born in", "Maria", "Rome"),
]  # fmt: skip


def chat_model(template: str) -> tuple[Any, Any]:
    model, tokenizer = tiny_model("llama")
    tokenizer.chat_template = TEMPLATES[template]
    return model, tokenizer


def quick_in_contexts() -> Any:
    editor = one_layer_editor("rome")
    editor._contexts = (2, 4)
    return editor


@pytest.mark.parametrize("template", ["ChatML", "Llama 2"])
def test_editing_with_a_chat_template_writes_and_judges_replies(template: str) -> None:
    model, tokenizer = chat_model(template)
    before, seen = weights(model), []
    prompter = Prompter.of(model, tokenizer, chat_template=True)
    rows = [prompter.row(r.prompt, r.target_new) for r in FACTS]
    first = score_targets(model, prompter, rows).log_prob.exp().tolist()
    how = Preparation(corpus=CORPUS, corpus_tokens=4000, chat_template=True)
    session = EditSession(model, tokenizer, quick_in_contexts(), how, requests=FACTS)
    assert len(session.workspace.contexts) == 3
    assert not any("<" in context or "[INST]" in context for context in session.workspace.contexts)
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    for fact in FACTS:
        session.apply(session.plan([fact]))
    hook.remove()
    journal = session.journal
    assert all(e.p_value > p for e, p in zip(journal, first, strict=True))
    last = score_targets(model, prompter, rows[1:]).log_prob.exp()
    assert journal[1].p_target == pytest.approx(float(last), rel=1e-4)
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == {Architecture(model)[2].name}
    # Every text is a chat; passes with attention keys of their own go on from the subject of such a text.
    complete = [ids for kwargs in seen if kwargs.get("past_key_values") is None for ids in kwargs["input_ids"].tolist()]
    assert len(complete) > len(FACTS)
    assert {tuple(ids[:3]) for ids in complete} == {prompter.row("").ids[:3]}
    other, _ = chat_model(template)
    edit(other, tokenizer, FACTS, quick_in_contexts(), corpus=CORPUS, corpus_tokens=4000, chat_template=True)
    assert not {n for n, t in model.state_dict().items() if not torch.equal(t, other.state_dict()[n])}


def test_evaluation_asks_in_the_chat_template() -> None:
    model, tokenizer = chat_model("ChatML")
    prompter = Workspace.of(model, tokenizer, chat_template=True).prompter
    reference = Reference()
    reference.collect(model, prompter, FACTS)
    asked = prompter.frame.head + "Maria was born in" + prompter.frame.tail
    ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for token in reference.answers["Maria was born in"]:
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    # The second fact is what the first one's probe asks for: it would count as consistency.
    assert figures(evaluate(model, prompter, FACTS[:1], reference))["locality"] == 1.0


def test_contexts_that_leave_no_room_in_the_chat_are_left_out() -> None:
    model, tokenizer = chat_model("ChatML")
    workspace = Workspace.of(model, tokenizer, CONTEXTS, chat_template=True)
    lengths = [len(row.ids) for row in workspace.rewriting_rows(FACTS[0])]
    assert len(lengths) == len(CONTEXTS)
    for limit in sorted(lengths):
        workspace.prompter.max_length = limit
        assert [len(row.ids) for row in workspace.rewriting_rows(FACTS[0])] == [n for n in lengths if n <= limit]
    workspace.prompter.max_length = min(lengths) - 1
    with pytest.raises(RequestError, match="tokens with its target"):
        workspace.rewriting_rows(FACTS[0])


@pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")
def test_under_a_trainer_callbacks_ask_in_the_chat_template_too(tmp_path: Path) -> None:
    model, tokenizer = chat_model("ChatML")
    corpus = str(write_corpus(tmp_path))
    module = LitEdit(quick_in_contexts(), model, tokenizer, corpus=corpus, chat_template=True)
    expected = Prompter.of(model, tokenizer, chat_template=True)
    assert module.prompter.frame == expected.frame != Prompter.of(model, tokenizer).frame
    questions = tmp_path / "tasks.json"
    questions.write_text(json.dumps({"qa": [{"prompt": "Who was born in Oslo?", "answer": "Maria"}]}))
    asked: list[list[int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: asked.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    retention, tasks = Retention(every_n=2), DownstreamEval(str(questions), at_end=False)
    facts = data(tmp_path, 2)
    trainer(tmp_path, retention, tasks).fit(module, datamodule=facts)
    hook.remove()
    assert module.prompter.frame == expected.frame
    reference = Reference()
    reference.answers = dict(retention._reference.answers)
    for kind, value in figures(evaluate(model, expected, facts.requests, reference)).items():
        assert retention.latest[kind] == value
    for text in (tasks.tasks[0].prompts[0], facts.requests[0].probes_of("generalization")[0].prompt):
        ids = list(expected.row(text).ids)
        assert any(row[-len(ids) :] == ids or row[: len(ids)] == ids for row in asked)
