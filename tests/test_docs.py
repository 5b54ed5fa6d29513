"""What README and docs/ name is there: files, links, make targets, and the options of commands."""

import json
import re
import shlex
from pathlib import Path

import pytest

from hybridsp.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
MEASUREMENTS = sorted((ROOT / "docs" / "measurements").glob("*"))


def commands(text):
    """The lines of the blocks of shell code, and what stands inline with options."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`(hybridsp [^`]* --[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))


def arguments_of(command):
    """Those of `hybridsp`, however it is started; None in a line that does not start it."""
    words = shlex.split(command, comments=True)
    for name in ("hybridsp", "hybridsp.cli"):
        if name in words:
            return words[words.index(name) + 1 :]
    return None


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page, capsys, subtests):
    for command in commands(PAGES[page].read_text()):
        arguments = arguments_of(command)
        if arguments is None:
            continue
        with subtests.test(command):
            try:
                build_parser().parse_args(arguments)
            except SystemExit:
                pytest.fail(f"{command}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = [*commands(PAGES[page].read_text())]
    wanted = {words[1] for line in lines if (words := line.split())[:1] == ["make"]}
    assert wanted <= set(targets)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    path = PAGES[page]
    text = path.read_text()
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    missing = [x for x in links if "://" not in x and not (path.parent / x).exists()]
    named = re.findall(r"`((?:hybridsp|train|tests|docs|ds_configs|models)/[\w./*-]+)", text)
    missing += [name for name in named if not [*ROOT.glob(name.rstrip("/"))]]
    assert missing == []


@pytest.mark.parametrize("path", MEASUREMENTS, ids=lambda path: path.name)
def test_measurements_can_be_read_and_are_cited(path):
    if path.suffix == ".json":
        json.loads(path.read_text())
    assert any(path.name in page.read_text() for page in PAGES.values())
