"""Rules of the project that can be read off its files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("mlx_v4flash", "metal_kernels")
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
DEVELOPERS = sorted(p for folder in ("tests", "benchmarks", "tools") for p in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Between a prompt and its logits nothing may wait for the device. engine.py and experts/ are where the host waits.
NEVER_WAITING = (
    *(
        ROOT / "mlx_v4flash" / f"{name}.py"
        for name in ("model", "hyper", "attention", "compressor", "moe", "rope", "cache")
    ),
    *sorted((ROOT / "metal_kernels").glob("*.py")),
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def tracked_files() -> list[Path]:
    """Files git tracks, or would once they are added."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so what belongs to the project is not known")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def imports(path: Path) -> Iterator[str]:
    """Top-level names of what a file imports, itself and its siblings aside."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0]


def third_party(paths: list[Path]) -> dict[str, str]:
    """Imported top-level names that are neither Python's nor ours, each with a file that imports it."""
    ours = {*PACKAGES, *(p.stem for p in DEVELOPERS), *(p.parent.name for p in DEVELOPERS), *sys.stdlib_module_names}
    return {name: name_of(path) for path in paths for name in imports(path) if name not in ours}


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normalised(re.split(r"[^\w.-]", r)[0]) for r in requirements}


def distributions(name: str) -> set[str]:
    """What may have to be installed for `import name`."""
    return {normalised(d) for d in packages_distributions().get(name, [name])}


def test_readme_and_ci_run_the_same_tests() -> None:
    first_page = (ROOT / "README.md").read_text().splitlines()[:30]
    commands = [line for line in first_page if line.startswith("python3 -m venv") and "pytest" in line]
    assert len(commands) == 1, f"expected one command that runs the tests in the first 30 lines, found {commands}"
    *enter, install, test = commands[0].split(" && ")
    assert enter == ["python3 -m venv .venv", ". .venv/bin/activate"]
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in ci if line.startswith("pip install -e")] == [install]
    assert [line for line in ci if "pytest" in line] == [test]


def test_imports_of_the_package_are_declared_and_used() -> None:
    used = third_party(MODULES)
    needed = declared(PROJECT["dependencies"]) | declared(PROJECT["optional-dependencies"]["plot"])
    assert len(used) >= 2, f"expected mlx, numpy and more, found {used}"
    undeclared = {name: where for name, where in used.items() if not distributions(name) & needed}
    assert not undeclared, f"imported but not among the dependencies in pyproject.toml: {undeclared}"
    unused = needed - {d for name in used for d in distributions(name)}
    assert not unused, f"among the dependencies in pyproject.toml but never imported: {unused}"


def test_imports_of_tests_and_benchmarks_are_declared() -> None:
    used = third_party(DEVELOPERS)
    assert "pytest" in used
    known = declared(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
    undeclared = {name: where for name, where in used.items() if not distributions(name) & known}
    assert not undeclared, f"imported but neither a dependency nor in the extra `test`: {undeclared}"


def test_kernels_know_nothing_of_the_model() -> None:
    kernels = sorted((ROOT / "metal_kernels").rglob("*.py"))
    assert kernels
    assert not [name_of(p) for p in kernels if "mlx_v4flash" in imports(p)]


def test_metal_sources_are_ascii() -> None:
    """A character beyond ASCII in a kernel compiles everywhere but on a Mac."""
    bodies = sorted((ROOT / "metal_kernels").rglob("*.metal"))
    if not bodies:
        pytest.skip("no .metal file in this version")
    assert not [name_of(p) for p in bodies if not p.read_bytes().isascii()]


def waits(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Calls that make the host wait for the device, by line."""
    # Numbers written in the file are no array of MLX.
    written_out = (ast.Constant, ast.List, ast.ListComp, ast.Tuple)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, called = ast.unparse(node.func.value), node.func.attr
        if called in ("item", "tolist"):
            yield node.lineno, f".{called}()"
        elif owner == "mx" and called in ("eval", "async_eval", "synchronize"):
            yield node.lineno, f"mx.{called}"
        elif f"{owner}.{called}" in ("np.array", "np.asarray") and not isinstance(node.args[0], written_out):
            yield node.lineno, f"np.{called}"


@pytest.mark.parametrize("path", NEVER_WAITING, ids=name_of)
def test_only_engine_and_experts_wait(path: Path) -> None:
    found = [f"{name_of(path)}:{line}: {call}" for line, call in waits(tree_of(path))]
    assert not found, f"waits for the device: {found}"


@pytest.mark.parametrize(
    ("code", "calls"),
    [
        ("mx.eval(x)", 1),
        ("mx.async_eval(x)", 1),
        ("x.sum().item()", 1),
        ("[i for i in x.tolist()]", 1),
        ("np.array(x)", 1),
        ("np.asarray(x[0], copy=False)", 1),
        ("np.array([1, 2]) + np.arange(3)", 0),
        ("model.eval()", 0),
        ("d.items()", 0),
    ],
)
def test_waits_are_recognised(code: str, calls: int) -> None:
    assert len(list(waits(ast.parse(code)))) == calls


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_sizes(path: Path) -> None:
    limit = 249 if name_of(path) == "mlx_v4flash/model.py" else 400
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{lines} lines, at most {limit}; is it still one noun?"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name} in line {node.lineno} has {lines} lines, at most 60"


def test_readme_shows_every_module() -> None:
    shown = (ROOT / "README.md").read_text().split("## How it is built")[1].split("\n## ")[0]
    ops = {"metal_kernels"}  # one line for all of them
    missing = [
        name_of(p) for p in MODULES if p.parent.name not in ops and p.name not in shown and p.name != "__main__.py"
    ]
    assert not missing, f"not in README.md, How it is built: {missing}"


def test_text_is_about_the_project() -> None:
    """Paths, hosts and settings of one machine mean nothing to a reader."""
    foreign = re.compile(
        r"(?<![\w.~-])/(?:work|root|Users/\w+|home/\w+|opt/\w+)/"
        r"|index[-_]url|find[-_]links|pypi[.]org|pythonhosted[.]|npmjs[.]",
        re.IGNORECASE,
    )
    read, found = 0, []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # weights
        read += 1
        found += [f"{name_of(path)}:{n}: {m.group()}" for n, text in enumerate(lines, 1) if (m := foreign.search(text))]
    assert read > 20, f"expected the project's files, found {read}"
    assert not found
