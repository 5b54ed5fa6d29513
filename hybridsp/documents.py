"""Documents on disk as one dataset: text files, tables, or what `datasets` saved.

Files are read by parsers that are part of `datasets` and never by a script that lies beside them.
A directory is read whole and in sorted order, so that the order of documents is the same on every
machine. What cannot be read is refused with the name of its source.
"""

import glob
from os import PathLike
from pathlib import Path

import datasets
from datasets import Dataset

from hybridsp.untrusted import inside, read_json, reading, shown

TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_documents(source: str | PathLike[str], *, text_field: str = "text") -> Dataset:
    """Load documents as a dataset with the single column ``"text"``, one row per document.

    Args:
        source: one of
            - a ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file: one document per row;
            - any other file: UTF-8 text, the whole file is one document;
            - a directory (read recursively, hidden files left out) or a glob such as
              ``corpus/**/*.py``: all its files, in sorted order, of one of the two kinds above;
            - a directory written by ``Dataset.save_to_disk``.
        text_field: the column that holds the text; text files have ``"text"``.

    Raises:
        ValueError: the source is missing or empty, mixes tables with text, cannot be decoded,
            or ``text_field`` is not a column of strings without nulls.
    """
    path = Path(source)
    if (path / "dataset_dict.json").is_file():
        raise ValueError(f"source={str(source)!r} holds several splits; name one of its folders")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        documents = _load_saved(path)
    else:
        documents = _load_files(_expand(source), source)
    return _text_column(documents, text_field, source)


def _load_saved(folder: Path) -> Dataset:
    """What `Dataset.save_to_disk` wrote, its files all from its own folder."""
    state = read_json(folder / "state.json")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise ValueError(f"{folder / 'state.json'}: _data_files = {shown(files)}: save it again")
    for file in files:
        inside(folder, file.get("filename"), f"{folder / 'state.json'}: _data_files")
    with reading(folder, "dataset", "save it again with Dataset.save_to_disk"):
        documents = datasets.load_from_disk(str(folder))
    if not isinstance(documents, Dataset):
        raise ValueError(f"source={str(folder)!r} holds several splits; name one of its folders")
    return documents


def _expand(source: str | PathLike[str]) -> list[Path]:
    """The files with content that ``source`` names, sorted: documents have a fixed order."""
    path = Path(source)
    with reading(path, "data", "give another path"):
        pattern = glob.escape(str(path)) + "/**/*" if path.is_dir() else str(source)
        hits = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        files = [hit for hit in hits if hit.is_file() and hit.stat().st_size]
    if not files:
        raise ValueError(f"source={str(source)!r} names no file with content; give another path")
    return files


def _load_files(files: list[Path], source: str | PathLike[str]) -> Dataset:
    formats = {TABLE_FORMATS.get(file.suffix, "text") for file in files}
    if len(formats) > 1:
        raise ValueError(
            f"source={str(source)!r} mixes files of the formats {sorted(formats)}; "
            "select one kind with a glob, as 'corpus/**/*.py'"
        )
    (file_format,) = formats
    options = {"sample_by": "document"} if file_format == "text" else {}
    # load_dataset takes patterns: what looks like one in a file's own name is escaped.
    data_files = [glob.escape(str(file.absolute())) for file in files]
    try:
        return datasets.load_dataset(file_format, data_files=data_files, split="train", **options)
    except Exception as error:  # of every kind: it parses what is in the files
        reason = error.__cause__ or error
        raise ValueError(f"source={str(source)!r} cannot be read: {reason}") from error


def _text_column(documents: Dataset, text_field: str, source: str | PathLike[str]) -> Dataset:
    what = f"text_field={text_field!r} of source={str(source)!r}"
    if text_field not in documents.column_names:
        raise ValueError(
            f"{what} does not exist; the columns are {documents.column_names}: rename the one that "
            f"holds the text to {text_field!r}"
        )
    if not len(documents):
        raise ValueError(f"{what} has no documents")
    documents = documents.select_columns(text_field)
    if documents._indices is not None:
        # Rows that were selected or shuffled: nulls are counted among those alone.
        documents = documents.flatten_indices()
    dtype = getattr(documents.features[text_field], "dtype", "a nested type")
    if dtype not in ("string", "large_string"):
        raise ValueError(f"{what} holds {dtype}, not text")
    if nulls := documents.data.column(text_field).null_count:
        raise ValueError(f"{what} has {nulls} null values; drop those documents")
    return documents if text_field == "text" else documents.rename_column(text_field, "text")


__all__ = ["load_documents"]
