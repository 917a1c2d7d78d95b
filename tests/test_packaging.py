"""The wheel holds all of the package and nothing beside it, and works where the repository is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
MAPPED = ("callbacks", "datamodules", "configs")  # folders at the top that are installed as parts of lit_edit
NO_SOURCE = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")

REUSE = """
import json, sys
import lightning as L
import torch
from torch.utils.data import DataLoader

import lit_edit
from lit_edit.callbacks import MatrixStability

class Autoencoder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Tanh(), torch.nn.Linear(3, 6))
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.net(batch), batch)
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)

watch = MatrixStability(every_n=4)
trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=8, callbacks=[watch], logger=False,
                    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
torch.manual_seed(0)
model = Autoencoder()
trainer.fit(model, DataLoader(torch.randn(64, 6), batch_size=8))
from lit_edit.configs.find import find_config, read_config
from lit_edit.datamodules import CounterFactDataModule
facts = CounterFactDataModule(n_edits=5)
facts.setup("fit")
print(json.dumps({
    "lit_edit": lit_edit.__file__,
    "config": find_config("mose.yaml"),
    "overlay": read_config("o-edit-rome.yaml")["model"]["editor"]["class_path"],
    "requests": len(facts.requests),
    "latest": watch.latest,
    "norm": torch.linalg.matrix_norm(model.net[0].weight.double()).item(),
}), file=sys.__stdout__)
"""


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def run(
    command: Sequence[str | Path], cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def source_files() -> set[str]:
    """Every file of the package in the repository, under the name it has when installed."""

    def belongs(path: Path) -> bool:
        return path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")

    found = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "lit_edit").rglob("*") if belongs(path)}
    for folder in MAPPED:
        for path in (REPOSITORY / folder).rglob("*"):
            if belongs(path):
                found.add(Path("lit_edit") / path.relative_to(REPOSITORY))
    return {path.as_posix() for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools keeps old files in `build/`, which would end up in the wheel again."""
    copy = tmp_path_factory.mktemp("source")
    for folder in ("lit_edit", *MAPPED):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=NO_SOURCE)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation, because an isolated build fetches setuptools over the network.
    done = run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy], cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_nothing_but_lit_edit_is_installed_at_the_top(names: set[str]) -> None:
    """Two projects that both ship a top-level `callbacks` would overwrite each other silently."""
    version = project()["project"]["version"]
    assert {name.split("/")[0] for name in names} == {"lit_edit", f"lit_edit-{version}.dist-info"}


def test_the_wheel_holds_every_file_of_the_package(names: set[str]) -> None:
    assert {name for name in names if name.startswith("lit_edit/")} == source_files()


def test_a_callback_is_used_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """In a module that has nothing to do with editing, in a folder that has nothing to do with the repository."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    done = run(install, cwd=elsewhere, environment={"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    script = elsewhere / "reuse.py"
    script.write_text(REUSE, encoding="utf-8")

    # `-S` leaves out `.pth` files, and with them the editable install; the other packages come by their folder.
    packages = sysconfig.get_paths()["purelib"]
    without = run([sys.executable, "-S", script], cwd=elsewhere, environment={"PYTHONPATH": packages})
    assert "No module named 'lit_edit'" in without.stderr
    path = os.pathsep.join([str(site), packages])
    done = run([sys.executable, "-S", script], cwd=elsewhere, environment={"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr

    # The program itself, under its own name.
    called = run([sys.executable, "-S", "-m", "lit_edit", "undo", "--help"], elsewhere, {"PYTHONPATH": path})
    assert called.returncode == 0, called.stderr
    assert called.stdout.startswith("usage: lit-edit undo")
    assert "lit-edit undo --run last --to 100" in called.stdout
    assert "train.py" not in called.stdout
    entry = next(site.glob("lit_edit-*.dist-info")) / "entry_points.txt"
    assert "lit-edit = lit_edit.start:main" in entry.read_text(encoding="utf-8")

    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert Path(said["lit_edit"]).is_relative_to(site)
    assert Path(said["config"]).is_relative_to(site)
    assert said["overlay"] == "lit_edit.editors.LocateThenEdit"
    assert said["requests"] == 5
    assert said["latest"]["stability/net.0.weight/frobenius_norm"] == pytest.approx(said["norm"], rel=1e-6)
    assert said["latest"]["stability/net.2.weight/condition_number"] >= 1
    assert said["latest"]["stability/mean_relative_drift"] > 0


@pytest.mark.parametrize("folder", MAPPED)
def test_the_folders_at_the_top_cannot_be_imported_by_their_bare_name(folder: str) -> None:
    """From the repository's root they could be, and would be a second copy of every class."""
    done = run([sys.executable, "-c", f"import {folder}"], cwd=REPOSITORY)
    assert done.returncode != 0
    assert f"ImportError: Import 'lit_edit.{folder}' instead of '{folder}'" in done.stderr


def test_the_list_of_packages_is_the_list_of_folders() -> None:
    setuptools = project()["tool"]["setuptools"]
    packages = {
        ".".join(path.parent.relative_to(REPOSITORY).parts) for path in (REPOSITORY / "lit_edit").rglob("__init__.py")
    }
    for folder in MAPPED:
        for path in (REPOSITORY / folder).rglob("__init__.py"):
            packages.add(".".join(("lit_edit", *path.parent.relative_to(REPOSITORY).parts)))
    assert sorted(setuptools["packages"]) == sorted(packages)
    assert setuptools["package-dir"] == {f"lit_edit.{folder}": folder for folder in MAPPED}


def test_every_folder_with_code_is_a_package() -> None:
    """Without an `__init__.py` a folder would be left out of the wheel, and the test above would not see it."""
    for root in ("lit_edit", *MAPPED):
        folders = {path.parent for path in (REPOSITORY / root).rglob("*.py")}
        assert folders
        assert [str(f.relative_to(REPOSITORY)) for f in folders if not (f / "__init__.py").is_file()] == []
