"""Read documents from local files and folders."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch_impl.experiment.text.documents import Document, unix_newlines
from torch_impl.experiment.text.records import from_records

SEPARATOR = "<|endoftext|>"
KINDS = (".txt", ".raw", ".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


def read_path(path: Path) -> list[Document]:
    """Read the documents of a file, or of a folder's files in the order of their names; see `sources.load_documents`."""
    if not path.is_dir():
        return list(_read_file(path))
    files = sorted(file for file in path.iterdir() if file.name.endswith(KINDS) and file.is_file())
    if not files:
        raise FileNotFoundError(f"{path} has no text files; put files of a known type there: {', '.join(KINDS)}")
    return [document for file in files for document in _read_file(file)]


def _read_file(path: Path) -> Iterable[Document]:
    kind = path.name.removesuffix(".gz")
    if not path.name.endswith(KINDS):
        raise ValueError(f"{path} has an unknown file type; allowed: {', '.join(KINDS)}")
    if kind.endswith(".parquet"):
        return from_records(_read_parquet(path), str(path))
    text = _read_text(path)
    if kind.endswith((".json", ".jsonl")):
        return from_records(_parse_json(text, path), str(path))
    pieces = [wikitext(text)] if kind.endswith(".raw") else _between_separators(text)
    return [Document(piece) for piece in pieces if piece.strip()]


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a JSON file. Errors: ValueError naming file and line."""
    return _parse_json(_read_text(path), path)


def _read_text(path: Path) -> str:
    """Read a file's text, with line feeds as line endings."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return unix_newlines(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt, or not a gzip file ({error}); download it again") from None


def wikitext(text: str) -> str:
    """Join the rows of WikiText's raw file with empty lines, as the papers do for evaluation.

    A blank line is an empty row. Any other line is a row that ends with a line feed, even if the file's last line lacks it.
    """
    rows = [f"{line}\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n")]
    return "\n\n".join(rows)


def _between_separators(text: str) -> list[str]:
    pieces = re.split(rf"^[^\S\n]*{re.escape(SEPARATOR)}[^\S\n]*$", text, flags=re.MULTILINE)
    return [piece.strip("\n") for piece in pieces] if len(pieces) > 1 else pieces


def _parse_json(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a JSON list, or of one record per line."""
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{path}{place} is not a JSON list of records: {_reason(error)}") from None
        yield from ((f"record {number}", record) for number, record in enumerate(records, 1))
        return
    # Not splitlines, which also splits at U+2028 and the like inside JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not a JSON record: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} is truncated or corrupt, or not a parquet file ({one_line(error)})") from None
    return ((f"record {number}", row) for number, row in enumerate(rows, 1))


def one_line(error: Exception) -> str:
    """Describe a library's exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
