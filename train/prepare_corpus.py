"""Long documents for the demo without a download: the sources of Python's standard library.

Every module is one document, from a few lines to more than a hundred thousand characters, and
every Python installation has them. Each twentieth file is held out for evaluation.

    python train/prepare_corpus.py demo/corpus        # writes train.jsonl and heldout.jsonl
"""

import argparse
import json
import sysconfig
import tokenize
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
HELD_OUT_EVERY = 20


def source_files(root: Path) -> list[Path]:
    """Python files below ``root`` that are not empty, in an order equal on every file system."""
    relative = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    wanted = (Path(name) for name in relative if SKIPPED_FOLDERS.isdisjoint(Path(name).parts))
    return [path for path in wanted if (root / path).stat().st_size]


def write_jsonl(path: Path, root: Path, files: list[Path]) -> None:
    """Write one line ``{"text", "source"}`` per file and print how much that was."""
    characters = 0
    with path.open("w", encoding="utf-8") as out:
        for file in files:
            with tokenize.open(root / file) as source:  # honours the file's coding declaration
                text = source.read()
            characters += len(text)
            out.write(json.dumps({"text": text, "source": file.as_posix()}) + "\n")
    print(f"{path}: {len(files)} documents, {characters} characters")


def main() -> None:
    """Write the two files; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out_dir", type=Path, help="where train.jsonl and heldout.jsonl go")
    parser.add_argument("--max-files", type=int, help="use only the first files (default: all)")
    args = parser.parse_args()
    if args.max_files is not None and args.max_files < 2:
        parser.error(f"--max-files={args.max_files} must be at least 2: one is held out")

    root = Path(sysconfig.get_paths()["stdlib"])
    files = source_files(root)[: args.max_files]
    if len(files) < 2:
        parser.error(f"the standard library at {root} has no sources; use another Python")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out_dir / "heldout.jsonl", root, files[::HELD_OUT_EVERY])
    training = [file for i, file in enumerate(files) if i % HELD_OUT_EVERY]
    write_jsonl(args.out_dir / "train.jsonl", root, training)


if __name__ == "__main__":
    main()
