"""Who may import whom: the spec knows no torch, the two packages do not know each other, production has one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("reference"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_spec_needs_numpy_alone(path: Path) -> None:
    import sys

    allowed = set(sys.stdlib_module_names) | {"numpy", "scipy", "reference"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


FLOORS = {"engine": 1, "decode": 1, "losa": 2, "experiment": 3, "bench": 3, "api": 4, "commands": 5, "__init__": 4}
FLOORS |= dict.fromkeys(("run", "pack", "generate", "serve", "cli"), 6)


def layer(name: str) -> int:
    """0 mirrored functions, 1 engine and decode, 2 Algorithm 1, 3 experiment, 4 library, 5 commands, 6 their entry points."""
    return FLOORS.get(name.partition(".")[2].partition(".")[0], 0)


@pytest.mark.parametrize("path", files("torch_impl"), ids=lambda p: str(p.relative_to(ROOT)))
def test_production_imports_one_way(path: Path) -> None:
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in ("reference", "oracle_tests"), f"{path} imports {name}"
        assert top != "tiny_models" or own == 3, f"{path} imports {name}"
        assert top != "torch_impl" or layer(name) <= own, f"{path} imports {name}"
        assert top not in ("transformers", "tqdm", "datasets") or own >= 1, f"{path} imports {name}"


def test_no_test_file_is_another_s_helper() -> None:
    for path in files("oracle_tests"):
        borrowed = [
            name for name in imports(path) if name.rsplit(".", 1)[-1].startswith("test_") and name.count(".") == 1
        ]
        assert not borrowed, f"{path} imports {borrowed}: move what both need into a module of its own"


PACKAGES = ("reference", "torch_impl", "oracle_tests", "tiny_models")
INTERNALS = {
    ("oracle_tests/spec/test_reconstruct.py", "reference.reconstruct._gradients"): "held against finite differences",
}
"""Private names that another file imports all the same, and why."""


def test_what_is_private_stays_in_its_file() -> None:
    """A module whose name begins with an underscore is its package's own, so the package's files may share it."""
    found = set()
    for path in [path for folder in PACKAGES for path in files(folder)]:
        for name in imports(path):
            is_module = (ROOT / f"{name.replace('.', '/')}.py").exists()
            if name.split(".")[0] in PACKAGES and name.rpartition(".")[2].startswith("_") and not is_module:
                found.add((str(path.relative_to(ROOT)), name))
    assert found == INTERNALS.keys()


def test_a_model_and_its_family_are_one_decoder() -> None:
    """Whoever needs both takes a `Decoder`, and only that looks for the family."""
    pairs, looking = [], set()
    for path in [*files("torch_impl"), *files("oracle_tests")]:
        place = str(path.relative_to(ROOT))
        looking |= {place for name in imports(path) if name.endswith(".find_family")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = {argument.arg for argument in arguments}
                has_family = any(a.arg == "family" or "Family" in ast.dump(a) for a in arguments)
                if has_family and names & {"model", "models"}:
                    pairs.append(f"{place}: {node.name}")
    assert not pairs
    assert looking == {"torch_impl/engine/decoder.py"}
