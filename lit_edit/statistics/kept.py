"""Statistics that are collected once and read from files from then on, a file for each layer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lit_edit.statistics.collect import Collector, Pace, check_texts, collect, gathered, interrupts, processes
from lit_edit.statistics.covariance import KeyCollector, warn_if_few
from lit_edit.statistics.files import (
    COMMAND,
    COVARIANCE,
    GRADIENT,
    Kind,
    Partial,
    StatisticsError,
    StatisticsHeader,
    corpus_sha256,
    model_fingerprint,
    read,
    read_header,
    save,
    tokenizer_fingerprint,
)
from lit_edit.statistics.gradient import GradientCollector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Statistics:
    """Statistics of one kind over some layers of a model: what is there, and how the rest is collected.

    Each layer has a file of its own, whose name follows from model, tokenizer, layer, corpus and lengths: another
    choice of layers uses what there is, anything else is collected anew.

    Args:
        kind: of the statistics, `KEY_COVARIANCES` or `GRADIENTS`.
        model: a causal language model of ``transformers``, before its first edit.
        tokenizer: its tokenizer.
        texts: the corpus. One that can be read only once is held in memory. One that has an ``identity`` (see
            `lit_edit.statistics.corpora.Corpus`) is known by that and its own ``name``, is read only as far as it is
            used, and not at all where the files are there; of any other all texts are read, to know it by its content.
        corpus_name: a name for it, for people.
        modules: the projections by name.
        folder: of the files.
        max_tokens: when to stop.
        sequence_length: longest sequence, in tokens.

    Attributes:
        headers: what the file of each layer must have been made from; with the number of tokens counted and the hash of
            the texts used, once :meth:`get` was called.
        paths: the file of each layer.
    """

    def __init__(
        self,
        kind: Kind,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[str],
        corpus_name: str,
        modules: Mapping[str, nn.Module],
        folder: str | os.PathLike[str],
        *,
        max_tokens: int = 100_000,
        sequence_length: int = 256,
    ) -> None:
        check_texts(texts)
        if not modules:
            raise ValueError(f"There are no modules to collect {kind.plural} for.")
        self.kind, self.model, self.tokenizer, self.modules = kind, model, tokenizer, dict(modules)
        self.texts = list(texts) if iter(texts) is texts else texts
        self.folder = Path(folder)
        identity = getattr(texts, "identity", None)
        if identity is None:
            known = corpus_sha256(self.texts)
        else:
            corpus_name, known = getattr(texts, "name", corpus_name), hashlib.sha256(identity.encode()).hexdigest()
        self.wanted = StatisticsHeader(
            kind=kind.name,
            model=model_fingerprint(model),
            tokenizer=tokenizer_fingerprint(tokenizer),
            layers=tuple(modules),
            corpus=corpus_name,
            corpus_sha256=known,
            max_tokens=max_tokens,
            sequence_length=sequence_length,
        )
        self.headers = {name: replace(self.wanted, layers=(name,)) for name in modules}
        self.paths = {name: self.folder / header.file_name for name, header in self.headers.items()}

    def missing(self) -> list[str]:
        """The layers that have no file."""
        return [name for name, path in self.paths.items() if not path.exists()]

    def partial(self) -> Partial:
        """The file of the sums while the missing layers are being collected."""
        return Partial.beside(replace(self.wanted, layers=tuple(self.missing())), self.folder, self.kind)

    def get(
        self,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        may_collect: bool = True,
        notify: Callable[[str], None] | None = None,
        save_every: int | None = None,
    ) -> dict[str, Tensor]:
        """The statistics, from their files; the missing ones are collected together and written.

        A collection that is broken off leaves its sums in :meth:`partial`, and the next one goes on from there. Where
        `torch.distributed` runs, all its processes have to call this: they collect together what any of them misses,
        the first one writes, and nothing is saved before the end.

        Args:
            batch_size: sequences in a forward pass; 16, or 4 with a backward pass, if ``None``.
            progress: show a progress bar.
            may_collect: whether missing statistics are collected; an error if not.
            notify: told how long a collection of more than a minute will take.
            save_every: save the sums after so many tokens; if ``None``, every five minutes.

        Returns:
            Matrices in float64 on the model's device, by the names of the modules.

        Raises:
            StatisticsError: if statistics are missing and may not be collected; as the collection says; or if a file
                cannot be read: it is not silently replaced.

        Warns:
            UserWarning: if key covariances were counted over fewer tokens than a key has features, or fewer than ten
                for each.
        """
        found = {}
        device = next(self.model.parameters()).device
        absent = {name for names in gathered(self.missing()) for name in names}
        missing = [name for name in self.modules if name in absent]
        for name, path in self.paths.items():
            if name not in missing:
                matrices, self.headers[name] = read(path, self.headers[name], self.kind)
                found[name] = matrices[name].to(device)
        if missing and not may_collect:
            raise StatisticsError(self._absence(missing))
        if missing:
            collector, size = _COLLECTORS[self.kind]
            partial = self.partial()
            pace = Pace(
                max_tokens=self.wanted.max_tokens,
                sequence_length=self.wanted.sequence_length,
                batch_size=size if batch_size is None else batch_size,
                progress=progress,
                notify=notify,
                save_every=save_every,
            )
            collected, position = collect(
                self.model,
                self.tokenizer,
                self.texts,
                {name: self.modules[name] for name in missing},
                collector,
                pace,
                partial,
            )
            # The sums are given up by now: an interrupt between two files would lose what is not written.
            with interrupts(held=True) as let_through:
                for name, matrix in collected.items():
                    header = replace(self.headers[name], n_tokens=position.tokens, texts_sha256=position.texts_sha256)
                    if processes()[0] == 0:
                        save(self.paths[name], {name: matrix}, header, self.kind)
                    self.headers[name] = header
                if processes()[0] == 0:
                    partial.remove()
                let_through()
            gathered(None)  # none goes on before the files are there
            found |= collected
        if self.kind is COVARIANCE:
            self._warn(found)
        return {name: found[name] for name in self.modules}

    def _warn(self, found: Mapping[str, Tensor]) -> None:
        by_tokens: dict[int, dict[str, int]] = {}
        for name, header in self.headers.items():
            by_tokens.setdefault(header.n_tokens or 0, {})[name] = len(found[name])
        for tokens, features in by_tokens.items():
            warn_if_few(features, tokens, stacklevel=4)

    def _absence(self, missing: list[str]) -> str:
        """What is not there, how to make it, and how the nearest thing that is there differs."""
        said = (
            f"There are no {self.kind.plural} of {', '.join(missing)} over {self.wanted.max_tokens} tokens of the "
            f"corpus {self.wanted.corpus!r} in {self.folder}: collect them with `{COMMAND}` and the options of this run"
        )
        others = map(read_header, sorted(self.folder.glob(f"{self.kind.name}-*.safetensors")))
        wanted = self.headers[missing[0]]
        differences = [other.differences(wanted) for other in others if other and other.layers == wanted.layers]
        if not differences:
            return f"{said}."
        nearest = min(differences, key=len)
        return f"{said}. The nearest there are were made from something else. {'; '.join(nearest)}."


KEY_COVARIANCES, GRADIENTS = COVARIANCE, GRADIENT
_COLLECTORS: dict[Kind, tuple[Callable[[Mapping[str, nn.Module]], Collector], int]] = {
    COVARIANCE: (KeyCollector, 16),
    GRADIENT: (GradientCollector, 4),
}


def covariances(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    corpus_name: str,
    modules: Mapping[str, nn.Module],
    cache_dir: str | os.PathLike[str],
    *,
    max_tokens: int = 100_000,
    sequence_length: int = 256,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, Tensor]:
    """:func:`collect_covariances` the first time, checked files from then on.

    Each layer has a file, whose name follows from model, tokenizer, layer, corpus and lengths, so anything else than
    what was collected before is collected anew, into files of its own. The files of other layers are of use, too.

    Args:
        model: as in :func:`collect_covariances`; collect before the first edit.
        tokenizer: its tokenizer.
        texts: the corpus, as in `Statistics`.
        corpus_name: a name for it, for people.
        modules: the projections by name.
        cache_dir: folder of the files.
        max_tokens: when to stop.
        sequence_length: longest sequence, in tokens.
        batch_size: sequences in a forward pass.
        progress: show a progress bar.

    Returns:
        ``C (p, p)`` in float64 on the model's device, by the names of ``modules``.

    Raises:
        StatisticsError: as :func:`collect_covariances`, and if a file cannot be read; it is not silently replaced.
    """
    asked = Statistics(
        COVARIANCE,
        model,
        tokenizer,
        texts,
        corpus_name,
        modules,
        cache_dir,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
    )
    return asked.get(batch_size=batch_size, progress=progress)


def gradients(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    corpus_name: str,
    modules: Mapping[str, nn.Module],
    cache_dir: str | os.PathLike[str],
    *,
    max_tokens: int = 100_000,
    sequence_length: int = 256,
    batch_size: int = 4,
    progress: bool = False,
) -> dict[str, Tensor]:
    """:func:`collect_gradients` the first time, checked files from then on, as :func:`covariances`.

    Returns:
        ``∇G (d, p)`` in float64 on the model's device, by the names of ``modules``.

    Raises:
        StatisticsError: as :func:`collect_gradients`, and if a file cannot be read; it is not silently replaced.
    """
    asked = Statistics(
        GRADIENT,
        model,
        tokenizer,
        texts,
        corpus_name,
        modules,
        cache_dir,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
    )
    return asked.get(batch_size=batch_size, progress=progress)
