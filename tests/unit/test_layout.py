"""DESIGN.md section 2: who may import whom, and how large a file may grow."""

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("fastssl", "loaders", "convert", "eval", "train", "scripts", "benchmarks", "tests")
MAY_IMPORT = {
    "fastssl": ("fastssl",),
    "fastssl/bench": OURS,
    "fastssl/augment/show.py": ("fastssl", "loaders.errors", "loaders.geometry", "loaders.images"),
    "loaders": ("loaders", "fastssl.views", "fastssl.rng", "fastssl.batch"),
    "convert": ("convert", "loaders", "fastssl.models"),
    "eval": ("eval", "fastssl", "loaders"),
}
WITHOUT_TORCH = (
    "fastssl/views.py",
    "fastssl/recipes.py",
    "fastssl/rng.py",
    "fastssl/config.py",
    "loaders/errors.py",
    "loaders/beton.py",
    "convert/imagenet.py",
)
MAX_LINES = 350
FILES = sorted(p for package in ("fastssl", "loaders", "convert", "eval") for p in (ROOT / package).rglob("*.py"))


def imported(source: str, module_level: bool = False) -> list[str]:
    """Dotted names that `source` imports; `from fastssl import rng` gives fastssl.rng.  Relative imports start with a dot."""
    tree = ast.parse(source)
    found = []
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return found


def forbidden(file: str, source: str) -> list[str]:
    """Imports of `source` that the rules for `file` (a path below the root), or else for its package, do not allow."""
    package = max((p for p in MAY_IMPORT if file == p or file.startswith(f"{p}/")), key=len)
    allowed = MAY_IMPORT[package]
    ours = [name for name in imported(source) if name.startswith(".") or name.split(".")[0] in OURS]
    return [name for name in ours if not any(name == a or name.startswith(f"{a}.") for a in allowed)]


@pytest.mark.parametrize("file", [str(p.relative_to(ROOT)) for p in FILES])
def test_imports(file):
    assert forbidden(file, (ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    "file, line",
    [
        ("loaders/x.py", "from fastssl import config"),
        ("loaders/x.py", "def f():\n    import fastssl.models.resnet"),
        ("convert/x.py", "from fastssl.engine import fit"),
        ("convert/x.py", "import eval.knn"),
        ("eval/x.py", "from convert.imagenet import scan"),
        ("fastssl/x.py", "from loaders.build import build_loader"),
        ("fastssl/methods/x.py", "from eval import knn"),
        ("fastssl/augment/show.py", "from loaders.build import build_loader"),
        ("fastssl/augment/blur.py", "from loaders.geometry import Geometry"),
        ("loaders/x.py", "from . import ring"),
    ],
)
def test_the_rules_catch(file, line):
    assert len(forbidden(file, line)) == 1


@pytest.mark.parametrize("file", WITHOUT_TORCH)
def test_no_torch_at_module_level(file):
    """Worker processes and command lines import these; torch costs seconds."""
    assert not [name for name in imported((ROOT / file).read_text(), module_level=True) if name.split(".")[0] == "torch"]


def test_every_file_has_a_room_of_its_own():
    assert FILES
    assert not [str(p.relative_to(ROOT)) for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")]
    assert not {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > MAX_LINES}


def test_no_bench_imports_another():
    """Their shared parts are modules of their own: each bench starts without the libraries that the others need."""
    folder = ROOT / "fastssl/bench"
    main = ast.parse((folder / "__main__.py").read_text())
    names = next(ast.literal_eval(n.value) for n in main.body if isinstance(n, ast.Assign) and n.targets[0].id == "BENCHES")
    for name in names:
        seen, todo = set(), [name]
        while todo:
            seen.add(module := todo.pop())
            found = {i.split(".")[2] for i in imported((folder / f"{module}.py").read_text()) if i.startswith("fastssl.bench.")}
            todo += [m for m in found - seen if (folder / f"{m}.py").is_file()]
        assert not seen & (set(names) - {name}), name


@pytest.mark.parametrize("file", sorted((ROOT / "tests/gpu").glob("test_*.py")), ids=lambda file: file.stem)
def test_gpu_tests_import_without_a_gpu(file):
    """One that does not ends the whole run of the others, and only a machine with a GPU would tell."""
    runpy.run_path(str(file))
