"""The README from the installed wheel: its commands, in order, in a folder that has nothing of the repository."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_packaging import wheel  # noqa: F401 - a fixture
from test_readme import REPOSITORY, blocks, lines, smaller


@pytest.mark.slow
def test_the_readme_walked_from_the_wheel(wheel: Path, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    site, place = tmp_path / "site", tmp_path / "place"
    (place / "docs").mkdir(parents=True)
    shutil.copy(REPOSITORY / "docs" / "facts.csv", place / "docs")  # the facts of one's own
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    paths = [str(site), sysconfig.get_paths()["purelib"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}

    def run(*program: str) -> str:
        # `-S` leaves out the `.pth` files, and with them an editable install.
        command = [sys.executable, "-S", *program]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{program}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        return done.stdout

    walked = 0
    for block in blocks("bash"):
        for line in lines(block):
            words = shlex.split(line)
            if words[0] != ".venv/bin/python":
                assert words[0] in ("make", ".venv/bin/tensorboard"), line
                continue
            program = ["-m", "lit_edit", *smaller(words[2:])] if words[1] == "train.py" else words[1:]
            assert "train.py" not in run(*program)
            walked += 1
    assert walked > 8
    assert (place / "edited-model" / "config.json").is_file()
    assert (place / "report.html").is_file()
    for block in blocks("python"):
        run("-c", block)
