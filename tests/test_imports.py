"""The architecture, held against every source file: who imports whom, and what importing does."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# pyproject.toml maps the folders of the top level to one installed package.
PACKAGES = {
    "hybridsp": "hybridsp",
    "models": "hybridsp.models",
    "train": "hybridsp.train",
    "ds_configs": "hybridsp.ds_configs",
}

# The parts of hybridsp from the bottom up: a module imports from its own row and from the rows
# above it here, never from one further down. A new module has to be placed.
LAYERS = [
    "mesh layout launch files sizes untrusted host_memory ds_configs",
    "ops collectives",
    "attention loss memory",
    "models",
    "parallelize adapters engine sharding data documents convert checkpoint recipe recipe_checks "
    "deepspeed_config faults pretrained prepare metrics curriculum lora planner self_check trainer "
    "distill release",
    "hybridsp",  # the public surface, hybridsp/__init__.py
    "cli cli_convert bench doctor evaluate train",
]
# One device's mathematics and the transport between devices do not know each other.
STRANGERS = [("ops", "collectives"), ("collectives", "ops")]

ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "putenv", "unsetenv"}
MAX_LINES = 400


def sources() -> dict[str, Path]:
    """Every source file, by the name under which it is imported."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def part_of(name: str) -> str:
    """The entry of LAYERS that `name` belongs to.

    hybridsp.ops.gla -> ops; hybridsp.SPMesh, which is no module, comes from the public surface.
    """
    parts = name.split(".")
    placed = {part for row in LAYERS for part in row.split()}
    if len(parts) > 1 and (parts[1] in placed or f"hybridsp.{parts[1]}" in SOURCES):
        return parts[1]
    return "hybridsp"


def layer_of(part: str) -> int:
    for layer, row in enumerate(LAYERS):
        if part in row.split():
            return layer
    raise AssertionError(f"place {part!r} in LAYERS of {__file__}, so that imports point downward")


def imports_of(name: str, source: str) -> Iterator[str]:
    """The absolute name of everything that module `name` imports, at any depth of its source.

    `from hybridsp import mesh` yields hybridsp.mesh. Imports for type checking count: they too
    say who knows whom.
    """
    is_package = name in SOURCES and SOURCES[name].name == "__init__.py"
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module or "").split(".")]
            yield from (".".join(filter(None, [*base, alias.name])) for alias in node.names)


def may_import(name: str, other: str) -> bool:
    top = other.split(".")[0]
    if top in PACKAGES and top != "hybridsp":
        return False  # importable by accident of the working directory, not where it is installed
    if top != "hybridsp":
        return True
    mine, theirs = part_of(name), part_of(other)
    if mine == "models":
        return theirs in ("models", "ops")
    return (mine, theirs) not in STRANGERS and layer_of(theirs) <= layer_of(mine)


def forbidden_imports(name: str, source: str) -> list[str]:
    others = sorted(set(imports_of(name, source)))
    return [f"{name} imports {other}" for other in others if not may_import(name, other)]


def environment_reads(name: str, source: str) -> list[str]:
    """Where `source` touches the environment, whichever way os is spelled."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
        else:
            continue
        found += [f"{name}:{node.lineno} uses os.{hit}" for hit in names & ENVIRONMENT_NAMES]
    return found


def test_every_module_has_a_place():
    assert SOURCES
    for name in SOURCES:
        layer_of(part_of(name))


def test_imports_point_downward():
    found = [line for name in SOURCES for line in forbidden_imports(name, text(name))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source", "forbidden"),
    [
        ("hybridsp.mesh", "import hybridsp.layout", []),
        ("hybridsp.mesh", "import hybridsp.engine", ["hybridsp.engine"]),
        ("hybridsp.ops.merge", "from hybridsp.mesh import SPMesh", []),
        ("hybridsp.ops.merge", "from hybridsp import collectives", ["hybridsp.collectives"]),
        ("hybridsp.ops.merge", "from ..collectives import halo", ["hybridsp.collectives.halo"]),
        ("hybridsp.ops.merge", "from .conv import causal_conv", []),
        ("hybridsp.collectives.ring", "import hybridsp.ops", ["hybridsp.ops"]),
        ("hybridsp.collectives.ring", "import hybridsp", ["hybridsp"]),
        ("hybridsp.attention.linear", "from hybridsp.ops import gla", []),
        ("hybridsp.attention.linear", "from hybridsp import SPMesh", ["hybridsp.SPMesh"]),
        ("hybridsp.engine", "def f():\n  import hybridsp.train.x", ["hybridsp.train.x"]),
        ("hybridsp.engine", "from hybridsp.models.hybrid_gla import X", []),
        ("hybridsp.loss", "import hybridsp.models.x", ["hybridsp.models.x"]),
        ("hybridsp.models.x.modeling_x", "from hybridsp.ops import X", []),
        ("hybridsp.models.x.modeling_x", "from hybridsp.mesh import X", ["hybridsp.mesh.X"]),
        ("hybridsp.models.x.modeling_x", "from hybridsp import X", ["hybridsp.X"]),
        ("hybridsp.train.finetune", "import hybridsp, torch", []),
        ("hybridsp.train.finetune", "from train import loop", ["train.loop"]),
        ("hybridsp", "from hybridsp.cli import main", ["hybridsp.cli.main"]),
    ],
)
def test_the_rule_itself(name, source, forbidden):
    assert forbidden_imports(name, source) == [f"{name} imports {other}" for other in forbidden]


def test_an_unknown_module_is_told_where_to_go(monkeypatch):
    monkeypatch.setitem(SOURCES, "hybridsp.novelty", Path("novelty.py"))
    with pytest.raises(AssertionError, match="place 'novelty' in LAYERS"):
        test_every_module_has_a_place()


def test_only_launch_and_the_scripts_know_the_environment():
    for source in (
        "import os\nos.environ['A']",
        "from os import getenv",
        "import os as o\no.getenv",
    ):
        assert environment_reads("m", source)
    found = [
        line
        for name in SOURCES
        if name != "hybridsp.launch" and part_of(name) != "train"
        for line in environment_reads(name, text(name))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "hits"),
    [
        ("import os\nos.environ['A']", ["m:2 uses os.environ"]),
        ("from os import getenv", ["m:1 uses os.getenv"]),
        ("import os as system\nsystem.getenv('A')", ["m:2 uses os.getenv"]),
        ("import os\nos.path.join('environ')", []),
    ],
)
def test_the_environment_rule_itself(source, hits):
    assert environment_reads("m", source) == hits


def test_importing_hybridsp_has_no_side_effects():
    code = """if True:
        import sys, torch
        threads, seed = torch.get_num_threads(), torch.initial_seed()
        import hybridsp
        assert not torch.distributed.is_initialized()
        assert not torch.cuda.is_initialized()
        assert "deepspeed" not in sys.modules
        assert (torch.get_num_threads(), torch.initial_seed()) == (threads, seed)
    """
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_every_module_opens_with_a_paragraph():
    silent = [
        name
        for name in SOURCES
        if text(name).strip() and not ast.get_docstring(ast.parse(text(name)))
    ]
    assert not silent, f"without a module docstring: {silent}"


def test_no_file_is_too_long():
    paths = [*SOURCES.values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    long = {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"split by meaning what has more than {MAX_LINES} lines: {long}"


def text(name: str) -> str:
    return SOURCES[name].read_text()
