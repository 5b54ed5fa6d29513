"""Reading files that somebody else wrote: what they hold is taken as data, and doubted.

A recipe, a config, an index of weights comes from anywhere: cut short, edited by hand, or made to
do harm. Whatever is wrong with it, the user gets one `ValueError` that names the file, before
anything is built from it. Read this way a file

- runs no code: YAML and JSON become plain values, and weights are read from safetensors;
- cannot lead out of its folder: `inside` refuses names such as `../x`;
- cannot fill the memory or take for ever: its size is bounded, and so is what YAML's references
  unfold to (a kilobyte of them can stand for more values than there are atoms);
- says a thing once: of a key that is written twice the second value would silently win;
- tells no secret: `redact` blanks what looks like a password or an access token in a message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import yaml

MAX_YAML_BYTES = 2**18
MAX_JSON_BYTES = 2**26
MAX_YAML_VALUES = 10_000
MAX_SHOWN = 200
INTEGER = "tag:yaml.org,2002:int"

SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{8,}"  # a Hugging Face access token
    r"|(?<=://)[^/\s@]+(?=@)"  # user:password@ of a URL
    r"|(?<=token=)[^&\s'\"]+|(?<=api_key=)[^&\s'\"]+|(?<=password=)[^&\s'\"]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text with what looks like a secret replaced by `***`."""
    return SECRETS.sub("***", text)


def shown(value: Any) -> str:
    """A value for a message: its repr, cut where it gets long, without secrets."""
    text = redact(repr(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def inside(folder: str | Path, name: Any, where: str) -> Path:
    """The path of a file that another file names, if it lies in the folder.

    Args:
        folder: what `name` is relative to.
        name: as the other file has it, of any type. Links in the folder are followed: caches of
            the Hub consist of them.
        where: what names it, for the message.

    Raises:
        ValueError: `name` is no string, is absolute, or climbs out of the folder.
    """
    if isinstance(name, str) and name and name.isprintable():
        parts = PurePath(name)
        if not parts.is_absolute() and ".." not in parts.parts and "\\" not in name:
            return Path(folder) / name
    raise ValueError(f"{where} names {shown(name)}, which is no file name in {folder}: repair it")


def read_text(path: str | Path, max_bytes: int, what: str = "") -> str:
    """An ordinary file as UTF-8 text.

    Args:
        path: the file.
        max_bytes: that it may have.
        what: goes before its name in an error, as "the recipe ".

    Raises:
        ValueError: it is missing, no ordinary file, larger than `max_bytes`, or no UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"cannot read {what}{path}: it is no ordinary file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"cannot read {what}{path}: it has more than {max_bytes} bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {what}{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {what}{path}: it is no UTF-8 text ({error})") from None


def parse_json(text: str, what: str) -> dict[str, Any]:
    """A JSON object.

    Args:
        text: the object.
        what: to call it in an error.

    Raises:
        ValueError: it is no JSON, no object, or has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no valid JSON: {redact(str(error))}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} must hold a JSON object, not {shown(value)}")
    return value


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; errors as of `read_text` and `parse_json`."""
    return parse_json(read_text(path, MAX_JSON_BYTES), str(path))


def parse_yaml(text: str, what: str) -> Any:
    """A YAML document as plain values.

    Raises:
        ValueError: it is no YAML, has a key twice, or unfolds to too many values; `what` names it.
    """
    try:
        loader = _EachKeyOnce(text)
        node = loader.get_single_node()
        _check_unfolded(node)
        return None if node is None else loader.construct_document(node)
    except Exception as error:  # PyYAML lets errors of every kind through
        reason = " ".join(redact(str(error)).split())
        raise ValueError(f"{what} is no valid YAML: {reason}") from error


def _check_unfolded(node: yaml.Node | None) -> None:
    """Refuse what would take for ever to build or to print, before it is built."""
    waiting, seen = [node], 0
    while waiting:
        one = waiting.pop()
        seen += 1
        if seen > MAX_YAML_VALUES:
            raise ValueError(f"it unfolds to more than {MAX_YAML_VALUES} values: shorten it")
        if isinstance(one, yaml.MappingNode):
            waiting += [part for item in one.value for part in item]
        elif isinstance(one, yaml.SequenceNode):
            waiting += one.value
        elif isinstance(one, yaml.ScalarNode) and one.tag == INTEGER and len(one.value) > 40:
            raise ValueError(f"a number of {len(one.value)} digits is none of a setting's")


@contextmanager
def reading(
    path: str | Path, what: str, remedy: str = "repair it or download it again"
) -> Iterator[None]:
    """Turn whatever a library meets in a broken file into a ValueError that names the file.

    Args:
        path: the file or folder.
        what: is read of it, as "config".
        remedy: what the user can do.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"the {what} of {path} cannot be read ({error}); {remedy}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the {what} of {path} cannot be read ({reason}); {remedy}") from error


def _each_key_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, part in pairs:
        if key in value:
            raise ValueError(f"the key {key!r} is there twice")
        value[key] = part
    return value


class _EachKeyOnce(yaml.SafeLoader):
    """Plain values only, and no key twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for number, key in enumerate(written):
            if isinstance(key, str) and key in written[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


__all__ = [
    "inside",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_text",
    "reading",
    "redact",
    "shown",
]
