"""Files: whole or absent whatever happens while they are written, and no flipped bit is taken for content."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_model
from helpers.sites import site_of

from lit_edit import files
from lit_edit.algebra.updates import LowRank
from lit_edit.editors.mend.network import HyperNetwork, HyperNetworkError
from lit_edit.files import DamagedFileError
from lit_edit.model.fingerprint import model_fingerprint
from lit_edit.runs.delta import DeltaError, load_delta, save_delta
from lit_edit.runs.updates import UpdateLog
from lit_edit.statistics import Header, StatisticsError
from lit_edit.statistics.store import load, save

FLIPS, CUTS = 60, 12
HEADER = Header("key_covariance", "m", "t", ("a",), "c", "s", 10, 8, 5, "u")
GRADIENT = replace(HEADER, kind="lm_gradient")


def _covariance(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    keys = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram = keys @ keys.T
    path = folder / "c.safetensors"
    save(path, (gram + gram.T) / 2, HEADER)
    return path, lambda file: load(file, HEADER)


def _gradient(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    path = folder / "g.safetensors"
    save(path, torch.arange(12.0, dtype=torch.float64).reshape(3, 4), GRADIENT)
    return path, lambda file: load(file, GRADIENT)


def _delta(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    model = tiny_model("llama")[0]
    original = model_fingerprint(model)
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("down_proj.weight"))
    before = weight.detach().clone()
    weight.data[0, :3] += 1
    path = folder / "d.safetensors"
    save_delta(path, model, {name: before}, original=original)
    return path, lambda file: load_delta(tiny_model("llama")[0], file)


def _network(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    network = HyperNetwork({0: (4, 6)}, rank=2, hidden=1)
    return network.save(folder, torch.nn.Linear(2, 2)), HyperNetwork.load


def _update(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    site, log = site_of(torch.randn(4, 6, generator=torch.Generator().manual_seed(1))), UpdateLog(folder)
    written = site.write(LowRank(torch.ones(4, 1), torch.ones(1, 6)))
    log.add("edit", [written], {3: site}, [1], edits=1)
    return log.path(1), lambda file: UpdateLog(file.parent).steps(log.writes[0])


def _checkpoint(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    path = folder / "edits.ckpt"
    files.save_checkpoint(path, {"state_dict": {"w": torch.arange(30.0)}, "lit_edit": {"journal": [{"number": 1}]}})
    return path, files.load_checkpoint


KINDS = {
    "covariance": _covariance,
    "gradient": _gradient,
    "delta": _delta,
    "network": _network,
    "update": _update,
    "ckpt": _checkpoint,
}
REFUSED = (DamagedFileError, StatisticsError, DeltaError, HyperNetworkError)


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_and_no_cut_is_taken_for_content(kind: str, tmp_path: Path) -> None:
    path, load = KINDS[kind](tmp_path)
    load(path)
    whole, rng = path.read_bytes(), random.Random(kind)
    size = len(whole)
    places = [0, 7, 8, size - 1, size - 40, size - 70, *(rng.randrange(size) for _ in range(FLIPS))]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(REFUSED):
            load(path)
    for length in (0, 1, size - 1, *(rng.randrange(size) for _ in range(CUTS))):
        path.write_bytes(whole[:length])
        with pytest.raises(REFUSED):
            load(path)
    path.write_bytes(whole)
    load(path)


@pytest.mark.parametrize(
    ("matrix", "refused"),
    [
        ([[2.0, 1.0], [1.0, 2.0]], False),
        ([[2.0, 1.0], [1.1, 2.0]], True),
        ([[2.0, 1.0], [1.0, -2.0]], True),
        ([[1.0, 5.0], [5.0, 1.0]], True),
    ],
)
def test_a_covariance_is_a_sum_of_keys(tmp_path: Path, matrix: list[list[float]], refused: bool) -> None:
    path = tmp_path / "c"
    files.save_tensors(
        path, {"a": torch.tensor(matrix, dtype=torch.float64)}, {"statistics": json.dumps(asdict(HEADER))}
    )
    if refused:
        with pytest.raises(StatisticsError, match="is no sum of keys"):
            load(path, HEADER)
    else:
        assert load(path, HEADER)[0].tolist() == matrix


def test_what_is_written_is_deterministic(tmp_path: Path) -> None:
    for name in ("one", "two"):
        files.save_tensors(tmp_path / name, {"b": torch.ones(2), "a": torch.zeros(3)}, {"y": "1", "x": "2"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert files.load_tensors(tmp_path / "one")[1] == {"x": "2", "y": "1"}


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "broken-in"),)

    files.save_checkpoint(tmp_path / "x.ckpt", {"state_dict": {}, "lit_edit": Attack()})
    with pytest.raises(DamagedFileError, match="not a checkpoint that can be read"):
        files.load_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "broken-in").exists()


# Writing


def _rewrite(kind: str, path: Path) -> None:
    if kind == "json":
        files.write_json(path, {"a": 2})
    elif kind == "tensors":
        files.save_tensors(path, {"a": torch.ones(500)}, {})
    else:
        files.save_checkpoint(path, {"a": torch.ones(500)})


WRITERS = ("json", "tensors", "checkpoint")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_failed_write_leaves_the_old_file_and_no_other(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full_disk(*args: object) -> None:
        raise OSError("No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, full_disk)
            with pytest.raises(OSError, match="No space"):
                _rewrite(kind, path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_size_limit_in_the_middle_of_a_write_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
        with pytest.raises(Exception, match=r"(?i)file too large|os error 27"):
            _rewrite(kind, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["tensors", "checkpoint"])
def test_what_cannot_be_read_back_does_not_replace_the_old_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    _rewrite(kind, path)
    old = path.read_bytes()
    flush = files._flush

    def bad_disk(written: Path) -> None:
        flush(written)
        if written.suffix == ".partial":
            content = bytearray(written.read_bytes())
            content[len(content) // 2] ^= 1
            written.write_bytes(content)

    monkeypatch.setattr(files, "_flush", bad_disk)
    with pytest.raises(DamagedFileError):
        _rewrite(kind, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["file"]


def test_others_may_read_the_files_as_far_as_the_umask_allows(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    for kind in WRITERS:
        _rewrite(kind, tmp_path / kind)
        assert (tmp_path / kind).stat().st_mode == plain.stat().st_mode


def test_drafts_of_a_killed_writer_are_cleared_away(tmp_path: Path) -> None:
    old, new = tmp_path / ".file.aa.partial", tmp_path / ".file.bb.partial"
    for draft in (old, new):
        draft.write_text("half")
    os.utime(old, (0, 0))
    files.write_json(tmp_path / "file", {})
    assert sorted(os.listdir(tmp_path)) == [".file.bb.partial", "file"]  # the new one may still be written


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x", {"a": math.nan})
    files.write_json(tmp_path / "x", {"a": "\ud800"})  # a lone surrogate, which UTF-8 cannot hold
    assert "ud800" in (tmp_path / "x").read_text()


KILLED = """
import sys, torch
from lit_edit import files
from lit_edit.algebra.updates import LowRank
i = 0
while True:
    i += 1
    files.save_checkpoint(sys.argv[1], {"count": i, "w": torch.full((200_000,), float(i))})
    print(i, flush=True)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_where_tmp_is_another_file_system(tmp_path: Path) -> None:
    folder = Path("/dev/shm") / f"lit-edit-{os.getpid()}"
    folder.mkdir()
    rng, target = random.Random(1), folder / "edits.ckpt"
    try:
        for _ in range(3):
            writer = subprocess.Popen(
                [sys.executable, "-c", KILLED, str(target)],
                stdout=subprocess.PIPE,
                env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
            )
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(rng.random() * 0.2)
            writer.kill()
            said = [int(line) for line in writer.stdout.read().split()]
            writer.wait()
            writer.stdout.close()
            content = files.load_checkpoint(target)
            assert content["count"] >= max(said, default=1)
            assert content["w"].unique().tolist() == [content["count"]]
    finally:
        shutil.rmtree(folder)


# Deltas that somebody made up


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": ["nowhere"]}, "a weight 'nowhere' that the model lacks"),
        ({"parameters": [3]}, "names weights by something else"),
        ({"parameters": {"a": 1}}, "says parameters is"),
        ({"original": None}, "says original is"),
        ({"error": "big"}, "says error is"),
        ({"edits": [1]}, "says edits is"),
    ],
)
def test_a_crafted_header_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, load = _delta(tmp_path)
    tensors, metadata = files.load_tensors(path)
    header = {**json.loads(metadata["delta"]), **change}
    files.save_tensors(path, tensors, {"delta": json.dumps(header)})
    with pytest.raises(DeltaError, match=message):
        load(path)


def test_deeply_nested_headers_are_refused(tmp_path: Path) -> None:
    path, load = _delta(tmp_path)
    tensors, _ = files.load_tensors(path)
    files.save_tensors(path, tensors, {"delta": "[" * 100_000})
    with pytest.raises(DeltaError, match="cannot be read"):
        load(path)


@pytest.mark.parametrize("kind", ["whole", "left", "dtype", "nan"])
def test_a_delta_that_fits_in_part_changes_nothing(tmp_path: Path, kind: str) -> None:
    model = tiny_model("llama")[0]
    names = [n for n, _ in model.named_parameters() if n.endswith("down_proj.weight")][:2]
    weights = dict(model.named_parameters())
    tensors = {name: torch.ones_like(weights[name]) for name in names}
    if kind == "whole":
        tensors[names[1]] = torch.ones(3, 3)
    elif kind == "dtype":
        tensors[names[1]] = tensors[names[1]].double()
    elif kind == "nan":
        tensors[names[1]][0, 0] = math.nan
    else:
        del tensors[names[1]]
        tensors |= {f"left:{names[1]}": torch.ones(5, 1), f"right:{names[1]}": torch.ones(1, 5)}
    header = {
        "original": model_fingerprint(model),
        "edited": None,
        "parameters": names,
        "error": 0.0,
        "method": "",
        "edits": 1,
        "format_version": 2,
    }
    files.save_tensors(tmp_path / "d", tensors, {"delta": json.dumps(header)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(DeltaError, match=r"shape|float64|not finite"):
        load_delta(model, tmp_path / "d")
    torch.testing.assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
