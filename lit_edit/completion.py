"""What a shell proposes when TAB is pressed."""

from __future__ import annotations

from collections.abc import Iterable

from lit_edit.configs.find import config_folder
from lit_edit.spelling import fit_options

SHELLS = ("bash", "zsh")

_SCRIPT = """\
_lit_edit() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  # bash takes the equals sign of an option for a word
  if [[ $current == "=" ]]; then current=""; elif [[ $before == "=" ]]; then before="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
  case "$before" in
    -c|--config|--configs)
      COMPREPLY=($(compgen -W "{configs}" -- "$current") $(compgen -f -X "!*.yaml" -- "$current"));;
    --data) COMPREPLY=($(compgen -W "{data}" -- "$current"));;
    --run|--resume) COMPREPLY=($(compgen -W "last" -- "$current") $(compgen -d -- "$current"));;
    *)
      if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
      elif [[ $current == -* && " fit single statistics compare " == *" ${{COMP_WORDS[1]}} "* ]]; then
        COMPREPLY=($(compgen -W "{options}" -- "$current"))
      else
        COMPREPLY=($(compgen -f -- "$current"))
      fi;;
  esac
}}
complete -o default -F _lit_edit lit-edit
"""
_DATA = ("CounterFactDataModule", "ZsREDataModule", "ConceptEditDataModule", "FactsDataModule")
_USUAL = ("model.editor.layers.layers", "data.path", "data.n_edits", "data.batch_size", "data.seed", "data.offset")


def script(shell: str, commands: Iterable[str]) -> str:
    """A script that teaches a shell the commands, configurations and options.

    Args:
        shell: ``bash`` or ``zsh``.
        commands: Names of the commands.

    Raises:
        ValueError: For another shell.
    """
    if shell not in SHELLS:
        raise ValueError(f"completion: for {' or '.join(SHELLS)}, not {shell!r}.")
    names = fit_options()
    options = {*(name for name, below in names.items() if below is None), *_USUAL}
    options |= {f"{group}.{name}" for group, below in names.items() for name in below or ()}
    folder = config_folder()
    configs = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    made = _SCRIPT.format(
        configs=" ".join(configs),
        data=" ".join(_DATA),
        commands=" ".join(commands),
        options=" ".join(f"--{name}" for name in sorted(options)),
    )
    return made if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{made}"
