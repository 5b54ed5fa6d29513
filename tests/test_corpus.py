"""The corpus of real text: what is read off a page, what is kept, and that it is reproducible."""

import gzip
import json
import re
import shutil
import subprocess

import pytest

from hybridsp.train.build_corpus import (
    LIST_OF_PACKAGES,
    FirstOccurrences,
    Package,
    build,
    fetch,
    is_english_prose,
    is_held_out,
    join_pages,
    read_list,
    text_of_file,
)
from hybridsp.train.page_text import text_of_page

PROSE = "The kernel keeps a list of every page that a process has touched, oldest first. "
needs_dpkg = pytest.mark.skipif(
    shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed"
)


def test_a_page_is_its_body_without_navigation():
    page = """<html><head><title>T</title><style>p {}</style></head><body>
      <nav><ul><li>Home<li>Next</ul></nav>
      <div class="sphinxsidebar"><div>Contents</div> here</div>
      <div role="main"><h1>Locks</h1><p>A lock is
      <b>held</b> by one&nbsp;owner.<p>Code:<pre>if x:
    y()</pre><ul><li>one<li>two</ul><script>evil()</script>
      <table><tr><td>a</td><td>b</td></tr></table></div>
      <div>Copyright</div></body></html>"""
    assert text_of_page(page) == (
        "Locks\n\nA lock is held by one owner.\n\nCode:\n\nif x:\n    y()\n\n- one\n- two\n\na b"
    )


def test_a_page_without_a_marked_body_is_read_whole_and_unclosed_tags_hide_nothing():
    assert text_of_page("<p class=toc>one<p>two<li class=menu>three") == "one\n\ntwo\n- three"


def test_files_are_read_by_their_names():
    page = b"<p>caf\xc3\xa9 &amp; tea</p>"
    assert text_of_file("a.html", page) == "café & tea"
    assert text_of_file("a.html.gz", gzip.compress(page)) == "café & tea"
    assert text_of_file("a.rst.txt", b"a <b>\r\n\n\n\nc \n") == "a <b>\n\nc"
    assert text_of_file("a.txt", b"caf\xe9") == "café"  # Latin-1


def test_only_english_prose_is_kept():
    assert is_english_prose(PROSE * 10)
    assert not is_english_prose(PROSE)
    assert not is_english_prose("0x00 | 1234 | 5678 |\n" * 100)
    assert not is_english_prose("Das Gerät läßt sich über Schlüssel öffnen. " * 20)


def test_a_paragraph_is_kept_where_it_occurred_first():
    paragraphs = FirstOccurrences()
    first = f"{PROSE * 2}\n\nSee also\n\n{PROSE * 3}"
    assert paragraphs.keep_new(first) == first.strip()
    other = f"New here.\n\n{(PROSE * 2).replace(' ', '  ')}\n\nSee also"
    assert paragraphs.keep_new(other) == "New here.\n\nSee also"


def test_pages_are_joined_within_a_folder_and_up_to_a_size(monkeypatch):
    monkeypatch.setattr("hybridsp.train.build_corpus.JOINED_CHARACTERS", 4)
    pages = [("a/1", "xx"), ("a/2", "yy"), ("a/3", "zz"), ("b/1", "w")]
    assert list(join_pages(pages)) == [("a/1", "xx\n\n\nyy"), ("a/3", "zz"), ("b/1", "w")]
    assert list(join_pages([])) == []


def test_about_two_documents_in_a_hundred_are_held_out_by_name():
    package = Package("p", "1", "0" * 64, "free", ["*"])
    documents = [{"package": "p", "source": f"page{i}", "text": "x"} for i in range(3000)]
    held = [document for document in documents if is_held_out(package, document)]
    assert 30 < len(held) < 90
    assert [d for d in documents if is_held_out(package, {**d, "text": "y"})] == held


def test_the_list_that_ships():
    packages = read_list(LIST_OF_PACKAGES)
    assert len(packages) >= 30
    assert sum(package.held_out for package in packages) == 3
    for package in packages:
        assert re.fullmatch("[0-9a-f]{64}", package.sha256)
        assert package.version
        assert package.licence
    # A paragraph belongs to whom comes first: what is held out keeps its own.
    assert [package.held_out for package in packages] == sorted(
        (package.held_out for package in packages), reverse=True
    )


def test_a_list_with_a_mistake_is_named(tmp_path):
    path = tmp_path / "list.yaml"
    entry = "- {name: a, version: '1', sha256: b, licence: c, include: ['*']}\n"
    path.write_text("packages:\n" + entry + entry)
    with pytest.raises(ValueError, match=r"\['a'\] occur twice"):
        read_list(path)
    path.write_text("packages:\n- {name: a, licence: c}\n")
    with pytest.raises(ValueError, match=r"entry 'a': .*missing"):
        read_list(path)


def make_package(folder, name: str, files: dict[str, str]) -> Package:
    """A Debian package of some files, and its entry."""
    tree = folder / name
    (tree / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1:2\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    (tree / "DEBIAN" / "control").write_text(control)
    for path, text in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    archive = folder / f"{name}_1%3a2_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(archive)], check=True, capture_output=True)
    done = subprocess.run(["sha256sum", str(archive)], check=True, capture_output=True, text=True)
    return Package(name, "1:2", done.stdout.split()[0], "free", ["usr/doc/*"], ["*/index.html"])


def pages(count: int, word: str) -> dict[str, str]:
    return {
        f"usr/doc/{i:03}.html": f"<p>{word} {i}: {PROSE}{PROSE}</p>"
        + f"<p>{i} {PROSE * 6}{word}</p>"
        for i in range(count)
    }


@needs_dpkg
def test_the_corpus_is_the_same_each_time_and_shares_no_paragraph(tmp_path):
    book = make_package(tmp_path, "book", pages(5, "alpha"))
    extra = {"usr/doc/index.html": f"<p>{PROSE * 9}</p>", "etc/x.html": f"<p>{PROSE * 9}</p>"}
    manual = make_package(tmp_path, "manual", pages(150, "beta") | pages(3, "alpha") | extra)
    book = Package(**{**vars(book), "held_out": True, "join": True})
    records = [build([book, manual], tmp_path, tmp_path / out) for out in ("one", "two")]
    assert records[0] == records[1]
    assert records[0] == json.loads((tmp_path / "one" / "sources.json").read_text())
    rows = {
        split: [json.loads(line) for line in (tmp_path / "one" / f"{split}.jsonl").open()]
        for split in ("train", "valid")
    }
    assert {row["package"] for row in rows["train"]} == {"manual"}
    assert sum(row["package"] == "book" for row in rows["valid"]) == 1
    assert 0 < sum(row["package"] == "manual" for row in rows["valid"]) < 15
    assert len(rows["train"]) + len(rows["valid"]) == 1 + 147  # three pages are the book's
    seen = [p for row in rows["train"] for p in row["text"].split("\n\n") if len(p) >= 100]
    held = {p for row in rows["valid"] for p in row["text"].split("\n\n") if len(p) >= 100}
    assert held.isdisjoint(seen)


@needs_dpkg
def test_a_package_of_other_bytes_is_refused(tmp_path):
    package = make_package(tmp_path, "book", pages(2, "alpha"))
    assert fetch(package, tmp_path).name == "book_1%3a2_all.deb"
    with pytest.raises(ValueError, match=r"has sha256 .* but the list says 00"):
        fetch(Package(**{**vars(package), "sha256": "00"}), tmp_path)
    with pytest.raises(ValueError, match=r"package book holds no text at include=\['none'\]"):
        build([Package(**{**vars(package), "include": ["none"]})], tmp_path, tmp_path / "out")
