"""Files beside the code: the container, how to cite, completion of what they name."""

from __future__ import annotations

import re
import sys

import yaml
from helpers.models import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def project() -> dict[str, object]:
    found = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert isinstance(found, dict)
    return found


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["title"], cited["version"], cited["license"]) == (
        project()["name"], project()["version"], project()["license"],
    )  # fmt: skip
    assert {"cff-version", "message", "authors"} <= set(cited)


def test_the_container_is_given_all_that_the_package_is_made_of() -> None:
    steps = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.*)$", steps, re.MULTILINE) for name in line.split()[:-1]]
    assert all((REPOSITORY / name).exists() for name in copied)
    assert {"lit_edit", "callbacks", "datamodules", "configs", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)
    let_in = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) <= let_in
    assert steps.index("pip install --no-cache-dir -c constraints.txt $TORCH") < steps.index("constraints.txt .")
    assert re.search(r"^USER (?!root)", steps, re.MULTILINE)
    assert 'ENTRYPOINT ["lit-edit"]' in steps
