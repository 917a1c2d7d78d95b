"""Files of records: JSON, JSON Lines, CSV, TSV, the same compressed, and Hugging Face data sets, as plain dictionaries.

Nothing here knows what an edit is. Each record comes with the words an error message uses to point at it
(``facts.csv, line 3``), so that whoever reads its fields can say where a bad one stands.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lit_edit.requests import RequestError
from lit_edit.units import counted, size_text

Record = Mapping[str, Any]
Located = tuple[str, Record | RequestError]

HUB_PREFIX = "hf:"
_DIGITS, _NESTED = 400, 30  # of a number, and of lists and objects within one another
_UNPACKED = 4 << 30  # bytes of a file at most
CELL_SEPARATOR = " | "
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}  # spreadsheet programs write what their language has


def plain_name(field: str) -> str:
    """A field's name as people mean it: ``Target New`` and ``target-new`` are ``target_new``."""
    return re.sub(r"[\s-]+", "_", field.strip().casefold())


def read_records(path: str | Path, list_columns: Collection[str] = ()) -> list[Located]:
    """Read a file of records.

    Args:
        path: A ``.json`` file (a list of objects, or an object in which exactly one value is a list), a ``.jsonl``
            file (one object a line, blank lines ignored), a ``.csv`` file (first line the column names; separated by
            commas, or by semicolons or tabs if that line is) or a ``.tsv`` file (separated by tabs, quotation marks
            being ordinary characters), each also with ``.gz`` appended; UTF-8. Or ``hf:owner/name``,
            ``hf:owner/name:split`` or ``hf:owner/name:config:split``
            for a data set of the Hugging Face hub, or ``hf:folder`` for one that ``Dataset.save_to_disk`` wrote
            (split ``train`` unless named; no code that comes with a data set is ever run).
        list_columns: CSV columns whose cells may hold several texts separated by ``" | "``; such a cell becomes
            a list.

    Returns:
        For each record, in file order, the words that locate it and its fields, or why they cannot be read. Records
        count from 1; JSON Lines and CSV records are located by the line they start in. An empty CSV cell is ``None``.

    Raises:
        RequestError: if there is no such file, it is of another kind, is empty or broken, or a record is not an
            object. The message is one line that names the file and the place in it.
    """
    if isinstance(path, str) and path.startswith(HUB_PREFIX):
        return _read_hub(path)
    file = Path(path).expanduser()
    stem = file.name[: -len(".gz")] if file.name.endswith(".gz") else file.name
    readers: dict[str, Callable[[str, str], list[Located]]] = {
        ".json": _parse_json,
        ".jsonl": _parse_jsonl,
        ".csv": lambda text, name: _parse_csv(text, name, list_columns),
        ".tsv": lambda text, name: _parse_csv(text, name, list_columns, tabs=True),
    }
    if not file.exists():
        raise RequestError(f"{file}: there is no such file.")
    if file.is_dir():
        raise RequestError(f"{file}: is a folder; name a file in it.")
    suffix = Path(stem).suffix.lower()
    if suffix not in readers:
        raise RequestError(f"{file}: is not a {', '.join(readers)} file (or one of these with .gz appended).")
    text = _read_text(file)
    if not text.strip():
        raise RequestError(f"{file.name}: the file is empty.")
    records = readers[suffix](text, file.name)
    if not records:
        raise RequestError(f"{file.name}: the file has no records.")
    return records


def _read_text(file: Path) -> str:
    """The text of a file, unpacked; a byte-order mark, which spreadsheet programs write, is taken off."""
    try:
        with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as stream:
            data = stream.read(_UNPACKED + 1)
        if len(data) > _UNPACKED:
            raise RequestError(f"{file.name}: is larger than {size_text(_UNPACKED)} unpacked; split it.")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(f"{file.name}: is not a readable gzip file ({error}).") from error
    except OSError as error:
        raise RequestError(f"{file}: cannot be read ({error.strerror}).") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RequestError(f"{file.name}, line {line}: is not UTF-8 text.") from error


def _record(value: Any, source: str) -> Record | RequestError:
    """A record, or why it is none."""
    if not isinstance(value, dict):
        return RequestError(f"{source}: is {_kind(value)}, not an object with named fields.")
    if isinstance(value, _Spoiled):
        return RequestError(f"{source}: {value.why}")
    if _depth(value) > _NESTED:
        return RequestError(f"{source}: is nested more than {_NESTED} levels deep.")
    return value


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


class _Spoiled(dict[str, Any]):
    """An object that JSON allows and nobody can have meant."""

    why = ""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, marked if it, or one in it, has a field twice: the first would be lost in silence."""
    found = dict(pairs)
    within = [item for _, value in pairs for item in (value if isinstance(value, list) else [value])]
    inner = next((item.why for item in within if isinstance(item, _Spoiled)), None)
    if len(found) == len(pairs) and inner is None:
        return found
    spoiled = _Spoiled(found)
    names = [name for name, _ in pairs]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    spoiled.why = (inner or "") if twice is None else f"has the field {twice!r} twice."
    return spoiled


def _loads(text: str, name: str, line: int = 1) -> Any:
    """JSON as Python values.

    Raises:
        RequestError: If it is none, or goes beyond what a record can need: the message names the line.
    """
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_int=_integer)
    except json.JSONDecodeError as error:
        place = f"{name}, line {line + error.lineno - 1}, column {error.colno}"
        raise RequestError(f"{place}: is not valid JSON ({error.msg}).") from error
    except RecursionError as error:
        raise RequestError(f"{name}, line {_deepest(text, line)}: is nested too deeply.") from error


def _integer(digits: str) -> int | float:
    """Python refuses to read numbers of thousands of digits; as a field of a record they are no text in any case."""
    return int(digits) if len(digits) < _DIGITS else math.inf


def _deepest(text: str, line: int) -> int:
    """The line in which brackets are nested deepest."""
    depth = most = 0
    at = line
    for match in re.finditer(r"[\[{\]}\n]", text):
        if match[0] == "\n":
            line += 1
        elif match[0] in "[{":
            depth += 1
            if depth > most:
                most, at = depth, line
        else:
            depth -= 1
    return at


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    deepest, open_ = 0, [(value, 1)]
    while open_:
        item, depth = open_.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict):
            open_ += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list):
            open_ += [(inner, depth + 1) for inner in item]
    return deepest


def _parse_json(text: str, name: str) -> list[Located]:
    value = _loads(text, name)
    if isinstance(value, dict):
        lists = {key: item for key, item in value.items() if isinstance(item, list)}
        if len(lists) != 1:
            found = f"{len(lists)} of its fields are lists" if lists else f"it has the fields {', '.join(value)}"
            raise RequestError(
                f"{name}: is an object, but not one with exactly one list of records in it ({found}); "
                "put the records into one list."
            )
        value = next(iter(lists.values()))
    if not isinstance(value, list):
        raise RequestError(f"{name}: holds {_kind(value)} where a list of records is expected.")
    sources = [f"{name}, record {number}" for number in range(1, len(value) + 1)]
    return [(source, _record(record, source)) for source, record in zip(sources, value, strict=True)]


def _parse_jsonl(text: str, name: str) -> list[Located]:
    records = []
    # Not `splitlines`: it also splits at characters such as U+2028, which are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{name}, line {number}"
        try:
            records.append((source, _record(_loads(line, name, number), source)))
        except RequestError as error:
            records.append((source, error))
    return records


def _parse_csv(text: str, name: str, list_columns: Collection[str], tabs: bool = False) -> list[Located]:
    # `strict`: without it an unclosed quotation mark swallows the rest of the file into one cell.
    separator = "\t" if tabs else _separator(text)
    form: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator, **form)
    header: list[str] = []
    records: list[Located] = []
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return records
        except csv.Error as error:
            raise RequestError(f"{name}, line {line}: is not valid {'TSV' if tabs else 'CSV'} ({error}).") from error
        if not any(cell.strip() for cell in row):
            continue
        if not header:
            header = [cell.strip() for cell in row]
            _check_header(header, f"{name}, line {line}")
            continue
        source = f"{name}, line {line}"
        if len(row) != len(header):
            raise RequestError(
                f"{source}: has {counted(len(row), 'cell')} where the header names {counted(len(header), 'column')}; "
                + (
                    "no text may have a tab in it."
                    if tabs
                    else f"put a text with a {_SEPARATORS[separator]} in it into quotation marks."
                )
            )
        records.append(
            (source, {col: _cell(cell, plain_name(col) in list_columns) for col, cell in zip(header, row, strict=True)})
        )


def _separator(text: str) -> str:
    """What stands between the cells: commas, unless the first line has none and is cut by something else."""
    first = next(line for line in text.splitlines() if line.strip())
    cells = {mark: len(next(csv.reader([first], delimiter=mark))) for mark in _SEPARATORS}
    return "," if cells[","] > 1 else max(cells, key=lambda mark: cells[mark])


def _check_header(header: list[str], source: str) -> None:
    if not all(header):
        raise RequestError(f"{source}: column {header.index('') + 1} has no name.")
    for position, column in enumerate(header):
        if column in header[:position]:
            raise RequestError(f"{source}: the column {column!r} is there twice.")


def _cell(cell: str, may_be_list: bool) -> str | list[str] | None:
    if not cell.strip():
        return None
    if may_be_list and CELL_SEPARATOR in cell:
        return cell.split(CELL_SEPARATOR)
    return cell


def _read_hub(address: str) -> list[Located]:
    """Records of a Hugging Face data set, from the hub or from a folder; never with code from the data set."""
    import datasets  # takes a second to import, which a run on a plain file need not spend

    name = address[len(HUB_PREFIX) :]
    folder, split, config = Path(name).expanduser(), "train", None
    if not folder.is_dir() and ":" in name:
        name, split = name.rsplit(":", 1)
        folder = Path(name).expanduser()
    if not folder.is_dir() and ":" in name:
        name, config = name.rsplit(":", 1)
    if not name or not split or config == "":
        raise RequestError(
            f"{address}: is not of the form hf:owner/name, hf:owner/name:split, hf:owner/name:config:split or "
            "hf:folder."
        )
    try:
        if folder.is_dir():
            loaded = datasets.load_from_disk(str(folder))
            data = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            # datasets 3 can still run a data set's own script, if it is let; datasets 4 cannot, and logs the argument
            # as an error.
            refuse_code = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
            data = datasets.load_dataset(name, *([] if config is None else [config]), split=split, **refuse_code)
    except Exception as error:
        # Several libraries take part (datasets, huggingface_hub, pyarrow, an HTTP client), without a common base
        # class for their errors; whatever went wrong is passed on, with the address in front.
        why = " ".join(str(error).split())
        raise RequestError(f"{address}: cannot be loaded ({type(error).__name__}: {why}).") from error
    if len(data) == 0:
        raise RequestError(f"{address}: the data set has no records.")
    source = f"{HUB_PREFIX}{name}:{split}" if config is None else f"{HUB_PREFIX}{name}:{config}:{split}"
    return [(f"{source}, record {number}", dict(record)) for number, record in enumerate(data, start=1)]
