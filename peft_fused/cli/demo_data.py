"""Labelled text from TSV, CSV or JSONL files, with errors that say where and what."""

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

MOST_CLASSES = 64
LEAST_ROWS = 5
SUFFIXES = (".tsv", ".csv", ".jsonl")


class DataError(ValueError):
    """A file that cannot be used, with the reason."""


@dataclass(frozen=True)
class Row:
    text: str
    label: str
    line: int


@dataclass(frozen=True)
class Data:
    """Texts with class indices; classes[i] is the label that index i stands for."""

    train: list[tuple[str, int]]
    evaluation: list[tuple[str, int]]
    classes: list[str]


def bundled(name: str) -> Path:
    return Path(__file__).parent / "data" / f"remarks_{name}.tsv"


def read(path: Path, text_column: str, label_column: str) -> list[Row]:
    """Rows of a file with a header line (TSV, CSV) or one JSON object per line (JSONL). Raises DataError."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: the name must end in {', '.join(SUFFIXES)}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not content.strip():
        raise DataError(f"{path}: the file is empty")
    columns = (text_column, label_column)
    records = _jsonl(path, content) if suffix == ".jsonl" else _table(path, content, suffix, columns)
    rows = []
    for line, record in records:
        _check_columns(path, line, columns, record)
        rows.append(Row(_text(path, line, record[text_column]), _label(path, line, record[label_column]), line))
    if not rows:
        raise DataError(f"{path}: there is a header but no row")
    return rows


def _check_columns(path: Path, line: int, wanted, found) -> None:
    for column in wanted:
        if column not in found:
            raise DataError(f"{path}, line {line}: no column {column!r}; columns: {', '.join(found)}")


def _table(path: Path, content: str, suffix: str, columns):
    csv.field_size_limit(len(content) + 1)  # the limit is the process's; a text may be as long as its file
    # A quotation mark in a TSV is part of the text; in a CSV it may enclose commas and line breaks.
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"strict": True}
    # Lines end at line feeds only: splitlines() would also split at the other separators that a text may contain.
    reader = csv.reader(io.StringIO(content), **style)
    try:
        header = next(reader)
        _check_columns(path, 1, columns, header)
        for column in columns:
            if header.count(column) > 1:
                raise DataError(f"{path}, line 1: {header.count(column)} columns are named {column!r}")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, but the header has {len(header)} columns"
                    f" ({', '.join(header)})"
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl(path: Path, content: str):
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
            raise DataError(f"{path}, line {line}: not JSON ({getattr(error, 'msg', error)})") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {line}: expected a JSON object, got {type(record).__name__}")
        yield line, record


def _text(path: Path, line: int, value) -> str:
    if not isinstance(value, str):
        raise DataError(f"{path}, line {line}: the text must be a string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {line}: the text has half of a surrogate pair, which is no character") from error
    return value


def _label(path: Path, line: int, value) -> str:
    if not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{path}, line {line}: the label must be a non-empty string or an integer, got {value!r}")
    return str(value).strip()


def _class_order(label: str) -> tuple:
    """Numbers by value, before words by letter."""
    digits = label.lstrip("0")
    return (0, len(digits), digits) if label.isdecimal() else (1, 0, label)


def load(train: Path, evaluation: Path | None, text_column: str, label_column: str, seed: int = 0) -> Data:
    """Both parts with the labels turned into class indices. Without `evaluation` 20 % of the rows are held out."""
    rows = read(train, text_column, label_column)
    if len(rows) < LEAST_ROWS:
        raise DataError(f"{train}: {len(rows)} rows; at least {LEAST_ROWS} are needed")
    classes = sorted({row.label for row in rows}, key=_class_order)
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise DataError(
            f"{train}: column {label_column!r} has {len(classes)} distinct values, a class label 2 to {MOST_CLASSES}"
        )
    if evaluation is None:
        random.Random(seed).shuffle(rows)
        held_out = max(1, len(rows) // 5)
        rows, held = rows[held_out:], rows[:held_out]
    else:
        held = read(evaluation, text_column, label_column)
    index = {label: i for i, label in enumerate(classes)}
    for row in held:
        if row.label not in index:
            raise DataError(
                f"{evaluation}, line {row.line}: label {row.label!r} is not in {train} (labels: {', '.join(classes)})"
            )
    return Data([(r.text, index[r.label]) for r in rows], [(r.text, index[r.label]) for r in held], classes)


class Batches:
    """Batches of a shuffled pass over the rows, then of the next one; the same for every method with the same seed."""

    def __init__(self, rows: list[tuple[str, int]], batch_size: int, seed: int):
        self.rows, self.batch_size = rows, batch_size
        self.random = random.Random(seed)
        self.queue: list[int] = []

    def __next__(self) -> list[tuple[str, int]]:
        while len(self.queue) < self.batch_size:
            self.queue += self.random.sample(range(len(self.rows)), len(self.rows))
        chosen, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return [self.rows[i] for i in chosen]
