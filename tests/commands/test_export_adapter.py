"""`train.py export --lora` and what goes with a folder: adapter, model card, upload, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.runs import command_line
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lit_edit import load_model
from lit_edit.cli import EditCLI, main
from lit_edit.runs.adapter import save_adapter
from lit_edit.runs.card import license_of, model_card

Said = pytest.CaptureFixture[str]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def made(
    request: pytest.FixtureRequest, tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Any]:
    """A run of three edits with ROME, the model it started from, and the edited model."""
    root = tmp_path_factory.mktemp("adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_EDIT_CACHE", str(root / "cache"))
        cli = EditCLI([*command_line(tiny_folder(request.param), root, "rome"), "--model.guard.max_change=1e9"])
    return root / "rome" / "version_0", tiny_folder(request.param), cli.model.model


def test_peft_loads_and_merges_the_adapter(made: tuple[Path, Path, Any], tmp_path: Path, capsys: Said) -> None:
    peft = pytest.importorskip("peft")
    run, original, edited = made
    assert main(["export", "--run", str(run), "--lora", str(tmp_path / "lora")]) == 0
    said = capsys.readouterr().out
    assert "1 weight, rank 3, relative error " in said  # three updates of rank one
    base = AutoModelForCausalLM.from_pretrained(original)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    now, wanted = dict(merged.named_parameters()), dict(edited.named_parameters())
    assert now.keys() == wanted.keys()
    for name, weight in now.items():
        assert float((weight - wanted[name]).norm()) <= 1e-5 * float(wanted[name].norm())
    changed = [name for name, weight in AutoModelForCausalLM.from_pretrained(original).named_parameters()
               if not torch.equal(weight, wanted[name])]  # fmt: skip
    assert len(changed) == 1


def test_a_smaller_rank_says_what_it_loses(made: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, original, edited = made
    before = load_model(str(original))[0]
    originals = {name: weight.detach() for name, weight in before.named_parameters()}
    name = next(n for n, w in edited.named_parameters() if not torch.equal(w, originals[n]))
    found = save_adapter(tmp_path / "one", edited, originals, base="x", rank=1)
    sizes = torch.linalg.svdvals((edited.get_parameter(name) - originals[name]).detach().double())
    assert found.ranks == {name: 1}
    assert found.lost == pytest.approx(float(sizes[1:].norm() / sizes.norm()), rel=1e-4)
    with pytest.raises(ValueError, match="No weight was changed"):
        save_adapter(tmp_path / "two", before, originals, base="x")
    torch.manual_seed(0)
    before.get_parameter(name).data += torch.randn_like(before.get_parameter(name))
    with pytest.raises(ValueError, match=r"is not of low rank: .* with --rank \d+ an error of 0\.\d+ remains"):
        save_adapter(tmp_path / "three", before, {name: originals[name].clone() * 0}, base="x")


def front(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_card_says_what_the_model_is(made: tuple[Path, Path, Any], tmp_path: Path) -> None:
    run, original, _ = made
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card == (run / "model" / "README.md").read_text(encoding="utf-8")  # the run's own is the same
    assert front(card)["license"] == "unknown"
    assert "base_model" not in front(card)  # a folder is no name on the hub
    assert f"3 facts were written into the weights of {original.name} with ROME" in card
    assert "| The capital of France is | Lyon |" in card
    assert "| reliability | 0 | 0 (0.00 to 0.00) |" in card or "| reliability | 0 | " in card
    assert main(["export", "--run", str(run), "--at", "1", "--out", str(tmp_path / "one")]) == 0
    first = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "1 fact was written" in first
    assert "## Scores" not in first  # they are of all three


def test_licence_and_base_model(tmp_path: Path) -> None:
    assert license_of("embedded") == front(model_card("embedded", "", []))["license"] == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    assert license_of(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("# Mine\n", encoding="utf-8")
    assert license_of(str(tmp_path)) == license_of("owner/name") == "unknown"
    assert front(model_card("owner/name", "", []))["base_model"] == "owner/name"
    assert "| a \\| b | c |" in model_card("x", "", [{"prompt": "a | b", "target_new": "c"}])


def test_another_precision_says_what_it_takes(made: tuple[Path, Path, Any], tmp_path: Path, capsys: Said) -> None:
    run, _, edited = made
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert "Rounded to bfloat16: up to " in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert plain.dtype == torch.bfloat16
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(weight, edited.get_parameter(name).to(torch.bfloat16), rtol=0, atol=0)


def test_upload_goes_through_transformers(
    made: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    sent: list[tuple[str, str, Any]] = []

    def note(what: str) -> Any:
        return lambda self, name, private=None: sent.append((what, name, private))

    monkeypatch.setattr(PreTrainedModel, "push_to_hub", note("model"))
    monkeypatch.setattr(PreTrainedTokenizerFast, "push_to_hub", note("tokenizer"))
    monkeypatch.setattr("huggingface_hub.ModelCard.push_to_hub", note("card"))
    assert main(["export", "--run", str(made[0]), "--push", "me/edited"]) == 0
    assert sent == [("model", "me/edited", True), ("tokenizer", "me/edited", True), ("card", "me/edited", None)]
    assert "Uploaded: me/edited (private)" in capsys.readouterr().out

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(PreTrainedModel, "push_to_hub", offline)
    assert main(["export", "--run", str(made[0]), "--push", "me/edited"]) == 2
    assert "'me/edited' was not uploaded (ConnectionError: no network)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rank", "3", "--delta", "x"], "export: --rank is for an adapter"),
        (["--out", "x", "--dtype", "int8"], "export: --dtype is one of float32"),
        (["--lora", "."], "export: there is something at . already"),
    ],
)
def test_refusals(given: list[str], message: str, capsys: Said) -> None:
    assert main(["export", "--run", "nowhere", *given]) == 2
    assert message in capsys.readouterr().err
