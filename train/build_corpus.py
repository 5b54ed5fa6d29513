"""Real text to convert, align and judge a model on: Debian's manuals and books, cleaned and split.

Packages of free documentation are the one large body of prose that everybody with a Debian mirror
can fetch byte for byte: `train/corpus.yaml` names each by version and sha256, with its licence and
the files wanted of it. This script fetches them, takes the text out of the pages, drops what is
not English prose, and writes the same files wherever it runs:

    python train/build_corpus.py corpus            # corpus/train.jsonl and corpus/valid.jsonl

What is held out is never seen in training, in three senses: some packages are held out whole, of
the others about one document in fifty, chosen by the digest of its name; and a paragraph that
occurs twice anywhere is kept only where it occurred first, so that no text of a held-out page
stands in another manual too. Pages of one folder are laid end to end where the list says `join`:
books and manuals then are documents of hundreds of thousands of tokens.

Needs `apt-get` and `dpkg-deb`, or the packages themselves in `--packages`; nothing is installed.
"""

from __future__ import annotations

import argparse
import bz2
import fnmatch
import gzip
import hashlib
import json
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from hybridsp.train.page_text import text_of_page, tidy

LIST_OF_PACKAGES = Path(__file__).with_name("corpus.yaml")
HELD_OUT_OF_10000 = 200
MIN_CHARACTERS = 400
JOINED_CHARACTERS = 2**20
PARAGRAPH_CHARACTERS = 100
# English prose is nearly all ASCII and mostly letters; tables of numbers and translations are not.
MIN_ASCII = 0.97
MIN_LETTERS = 0.6
UNPACK = {".gz": gzip.decompress, ".dz": gzip.decompress, ".xz": lzma.decompress,
          ".bz2": bz2.decompress}  # fmt: skip


@dataclass(frozen=True)
class Package:
    """One Debian package of the list and what is wanted of it.

    Attributes:
        name, version, sha256: which package file, to the byte.
        licence: the licence of its text, for whoever passes the text on.
        include, exclude: patterns of `fnmatch` over paths inside the package; ``*`` crosses ``/``.
        join: lay the pages of one folder end to end.
        held_out: all its documents are for evaluation.
    """

    name: str
    version: str
    sha256: str
    licence: str
    include: list[str]
    exclude: list[str] = field(default_factory=list)
    join: bool = False
    held_out: bool = False

    def wants(self, path: str) -> bool:
        """Whether the file at `path` is part of the corpus."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.include) and not any(
            fnmatch.fnmatchcase(path, pattern) for pattern in self.exclude
        )


def read_list(path: Path) -> list[Package]:
    """The packages that a list names.

    Raises:
        ValueError: an entry lacks a field or has an unknown one, or a name occurs twice.
    """
    packages = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["packages"]:
        try:
            packages.append(Package(**entry))
        except TypeError as error:
            raise ValueError(f"{path}: entry {entry.get('name')!r}: {error}") from error
    names = [package.name for package in packages]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: {sorted(twice)} occur twice; keep one entry of each")
    return packages


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, fetched with `apt-get download` unless it is there.

    Raises:
        ValueError: it cannot be had in the named version, or its sha256 is another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (found := _find(package, folder)) is None:
        wanted = f"{package.name}={package.version}"
        command = ["apt-get", "download", "-q", wanted]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        found = _find(package, folder)
        if done.returncode or found is None:
            raise ValueError(
                f"package {wanted} cannot be fetched: {done.stderr.strip()[-300:]}; mirrors keep "
                f"current versions only: put the file of that version into {folder}"
            )
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{found} has sha256 {digest}, but the list says {package.sha256}; remove the file"
        )
    return found


def _find(package: Package, folder: Path) -> Path | None:
    version = package.version.replace(":", "%3a")
    return next(iter(sorted(folder.glob(f"{package.name}_{version}_*.deb"))), None)


def files_of(archive: Path, package: Package) -> Iterator[tuple[str, bytes]]:
    """Path and content of each regular file that is wanted of a Debian package."""
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as files,
    ):
        for member in files:
            path = member.name.removeprefix("./")
            if member.isfile() and package.wants(path):
                content = files.extractfile(member)
                assert content is not None, path
                yield path, content.read()
    if unpack.returncode:
        raise ValueError(f"{archive} cannot be unpacked: dpkg-deb ended with {unpack.returncode}")


def text_of_file(path: str, content: bytes) -> str:
    """The text of a file of documentation: HTML by its name, anything else as it stands."""
    suffix = PurePosixPath(path).suffix
    if suffix in UNPACK:
        content, path = UNPACK[suffix](content), path.removesuffix(suffix)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    is_page = PurePosixPath(path).suffix.lower() in (".html", ".htm", ".page")
    return text_of_page(text) if is_page else tidy(text)


def is_english_prose(text: str) -> bool:
    """Long enough, nearly all ASCII, and letters for the most part."""
    seen = [character for character in text if not character.isspace()]
    if len(text) < MIN_CHARACTERS:
        return False
    ascii_only = sum(character.isascii() for character in seen)
    letters = sum(character.isalpha() for character in seen)
    return ascii_only >= MIN_ASCII * len(seen) and letters >= MIN_LETTERS * len(seen)


class FirstOccurrences:
    """Drops each paragraph that was seen before, in this document or any earlier one."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def keep_new(self, text: str) -> str:
        """`text` without paragraphs of at least `PARAGRAPH_CHARACTERS` that occurred before."""
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= PARAGRAPH_CHARACTERS:
                digest = hashlib.sha256(words.encode()).digest()[:12]
                if digest in self._seen:
                    continue
                self._seen.add(digest)
            kept.append(paragraph)
        return "\n\n".join(kept).strip()


def join_pages(pages: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Lay the pages of each folder end to end, to documents of about `JOINED_CHARACTERS`.

    Args:
        pages: paths and texts, in the order of their paths.

    Yields:
        The path of a document's first page, and its text.
    """
    first, texts = "", [""]
    for path, text in pages:
        full = sum(map(len, texts)) >= JOINED_CHARACTERS
        if full or not first or PurePosixPath(first).parent != PurePosixPath(path).parent:
            if first:
                yield first, "\n\n\n".join(texts)
            first, texts = path, []
        texts.append(text)
    if first:
        yield first, "\n\n\n".join(texts)


def documents_of(
    package: Package, archive: Path, paragraphs: FirstOccurrences
) -> Iterator[dict[str, Any]]:
    """The package's documents as ``{"text", "package", "source"}``, in the order of their paths."""
    files = sorted(files_of(archive, package))
    texts = ((path, text_of_file(path, content)) for path, content in files)
    prose = ((path, text) for path, text in texts if is_english_prose(text))
    pages = ((path, paragraphs.keep_new(text)) for path, text in prose)
    enough = ((path, text) for path, text in pages if len(text) >= MIN_CHARACTERS)
    for path, text in join_pages(enough) if package.join else enough:
        yield {"text": text, "package": package.name, "source": path}


def is_held_out(package: Package, document: dict[str, Any]) -> bool:
    """Whether a document is for evaluation; depends on its name alone."""
    return package.held_out or _rank(document, "held out") % 10_000 < HELD_OUT_OF_10000


def _rank(document: dict[str, Any], purpose: str) -> int:
    name = f"{purpose} {document['package']} {document['source']}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def write_split(path: Path, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Write documents in an order that mixes the packages; returns their count and digest."""
    documents.sort(key=lambda document: _rank(document, "order"))
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    content = "".join(lines).encode()
    path.write_bytes(content)
    characters = sum(len(document["text"]) for document in documents)
    print(f"{path}: {len(documents)} documents, {characters} characters")
    return {
        "documents": len(documents),
        "characters": characters,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def build(packages: list[Package], debs: Path, out_dir: Path) -> dict[str, Any]:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``sources.json``; returns what the last holds.

    Raises:
        ValueError: a package cannot be had, or its files hold no document.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    paragraphs = FirstOccurrences()
    train: list[dict[str, Any]] = []
    valid: list[dict[str, Any]] = []
    sources = []
    for package in packages:
        documents = list(documents_of(package, fetch(package, debs), paragraphs))
        if not documents:
            raise ValueError(f"package {package.name} holds no text at include={package.include}")
        held_out = [is_held_out(package, document) for document in documents]
        for document, held in zip(documents, held_out, strict=True):
            (valid if held else train).append(document)
        characters = sum(len(document["text"]) for document in documents)
        print(f"{package.name}: {len(documents)} documents, {characters} characters", flush=True)
        entry = {"name": package.name, "version": package.version, "sha256": package.sha256}
        entry |= {"licence": package.licence}
        sources.append(entry | {"documents": len(documents), "held_out": sum(held_out)})
    record = {
        "packages": sources,
        "train": write_split(out_dir / "train.jsonl", train),
        "valid": write_split(out_dir / "valid.jsonl", valid),
    }
    (out_dir / "sources.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def main() -> None:
    """Build the corpus; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out_dir", type=Path, help="where train.jsonl and valid.jsonl go")
    parser.add_argument("--list", type=Path, default=LIST_OF_PACKAGES, help="packages to use")
    parser.add_argument(
        "--packages", type=Path, help="folder of .deb files (default: OUT/packages)"
    )
    args = parser.parse_args()
    try:
        build(read_list(args.list), args.packages or args.out_dir / "packages", args.out_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
