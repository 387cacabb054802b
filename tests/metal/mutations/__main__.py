"""Break each kernel body in small ways, one at a time, and see whether the kernels' tests notice.

    python tests/metal/mutations [--each 10] [--jobs N] [BODY ...]

A mutant drops a barrier, a cast or a statement, shifts an index or a constant, turns a comparison, swaps two sides.
Which ones are made of a body depends on its text alone. Those that do not compile are replaced by others and not
counted. Prints for each mutant which test noticed it, or SURVIVED; then the share that was caught. A survivor that
changes nothing a caller can see is listed in `survivors.txt` with the reason, as `BODY: CHANGE | REASON`; exits 1 if
another one survives. Runs in copies of the project, and takes some seconds for each mutant.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutations import ROOT, copy_of

BODIES = ROOT / "metal_kernels"
KNOWN = Path(__file__).with_name("survivors.txt")
LIMIT_S = 300
# What is changed, and what it becomes. A group named `left` is kept in front.
RULES: dict[str, list[tuple[str, str]]] = {
    "drop a barrier": [(r"(?:threadgroup|simdgroup)_barrier\([^;]*\);", ";")],
    "drop a reduction": [(r"\b(?:metal::)?simd_(?:sum|max|min|product)\b", "")],
    "drop a rounding": [(r"static_cast<float>\(static_cast<Elem>\((\w+)\)\)", r"\1"), (r"\brounded<Elem>", "")],
    "shift an index": [(r"(?<=\w)\[([^\]\[]+)\](?=[^{]*;)", r"[\1 + 1]")],
    "turn a comparison": [
        (r"(?<= )<(?= )", "<="), (r"(?<= )>(?= )", ">="), (r"(?<= )==(?= )", "!="), (r"(?<= )>=(?= )", ">"),
    ],
    "swap a side": [
        (r"\bmetal::min\b", "metal::max"), (r"\bmetal::max\b", "metal::min"),
        (r"\? ([^?:;]+) : ([^?:;]+)(?=;)", r"? \2 : \1"), (r"(?<= )&&(?= )", "||"),
    ],
    "another operation": [
        (r"(?<= )\+(?= )", "-"), (r"(?<= )-(?= )", "+"), (r"(?<= )\*(?= )", "+"), (r"(?<= )\+=(?= )", "="),
        (r"(?<= )/(?= )", "*"), (r"(?<= )%(?= )", "/"), (r"(?<= )<<(?= )", ">>"), (r"(?<= )&(?= )", "|"),
    ],
    "another number": [
        (r"(?<![\w.])0\.0f", "1.0f"), (r"(?<![\w.])1\.0f", "2.0f"), (r"(?<![\w.])(\d+)(?![\w.])", "<more>"),
    ],
    "drop a statement": [(r"(?m)^(?P<left> *)[\w.\[\]]+ [-+*|]?= [^;{}]+;$", ";")],
}  # fmt: skip

# The size of an array is no index: one more element changes nothing.
DECLARATION = re.compile(r"\s*(?!return)[\w:<>, ]+ \w+(?:\[[^\]]*\])+(?: = \{\})?;")


@dataclass(frozen=True)
class Mutant:
    """A body with one change."""

    body: str
    line: int
    rule: str
    before: str
    after: str
    text: str

    @property
    def change(self) -> str:
        return f"{self.rule}: {' '.join(self.before.split())} -> {' '.join(self.after.split())}"


def mutants(path: Path) -> list[Mutant]:
    """Every mutant of a body, in an order that depends on its text alone and takes turns between the rules."""
    text = path.read_text(encoding="ascii")
    rng = random.Random(path.name)
    turns: list[list[Mutant]] = []
    for rule, pairs in RULES.items():
        found = [m for pattern, new in pairs for m in _changes(path.stem, text, rule, pattern, new)]
        rng.shuffle(found)
        turns.append(found)
    longest = max(map(len, turns))
    return [found[i] for i in range(longest) for found in turns if i < len(found)]


def _changes(body: str, text: str, rule: str, pattern: str, new: str) -> Iterator[Mutant]:
    for match in re.finditer(pattern, text):
        start = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.end())
        line = text[start:end]
        if "//" in text[start : match.start()] or line.lstrip().startswith(("//", "#", "template", "constexpr")):
            continue
        if DECLARATION.match(line):
            continue
        word = str(int(match[0]) + 1) if new == "<more>" else match.expand(new)
        left = match.groupdict().get("left") or ""
        changed = text[: match.start()] + left + word + text[match.end() :]
        after = changed[start : changed.find("\n", match.start() + len(left) + len(word))]
        yield Mutant(body, text.count("\n", 0, start) + 1, rule, line, after, changed)


def suites(body: str) -> list[str]:
    """Test files whose kernels contain the body, those of the ops made from it first."""
    tests = sorted(Path(__file__).resolve().parents[1].glob("test_*_kernel.py"))
    users = {p.stem for p in BODIES.glob("*.py") if re.search(rf"[\" ]{body}[\" ]", p.read_text(encoding="utf-8"))}
    users -= {"_cases", "__init__"}
    near = [t for t in tests if any(re.search(rf"\b{user}\b", t.read_text(encoding="utf-8")) for user in users)]
    if not near:
        raise ValueError(f"{body}.metal: expected a test of the kernels in {sorted(users)}, found none")
    near.sort(key=lambda t: (body not in t.stem, not any(user in t.stem for user in users), t.stem))
    return [str(t.relative_to(ROOT)) for t in near]


def caught(mutant: Mutant, root: Path) -> str | None:
    """The failing test and its message, "" if none fails, None if the mutant does not compile."""
    with copy_of(root) as folder:
        (folder / "metal_kernels" / f"{mutant.body}.metal").write_text(mutant.text, encoding="ascii")
        env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder), "COLUMNS": "200"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *suites(mutant.body)]
        try:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"did not finish within {LIMIT_S} s"
    if done.returncode == 0:
        return ""
    if "CompileError" in done.stdout:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.+?) - (.*)$", done.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{mutant.body}: no test ran:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return f"{found[1].rpartition('/')[2]}  {found[2]}"


def try_body(path: Path, each: int, root: Path) -> list[tuple[Mutant, str]]:
    """Up to `each` mutants that compile, with what caught them."""
    tried: list[tuple[Mutant, str]] = []
    for mutant in mutants(path):
        if len(tried) == each:
            break
        result = caught(mutant, root)
        if result is not None:
            tried.append((mutant, result))
            print(f"{mutant.body}:{mutant.line}: {mutant.change}\n    {result or 'SURVIVED'}", flush=True)
    return tried


def known_survivors() -> dict[str, str]:
    """Changes of bodies that are known to change nothing, and why."""
    lines = KNOWN.read_text(encoding="utf-8").splitlines() if KNOWN.exists() else []
    parts = [line.rsplit(" | ", 1) for line in lines if line and not line.startswith("#")]
    return {change: reason for change, reason in parts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bodies", nargs="*", metavar="BODY")
    parser.add_argument("--each", type=int, default=10, help="mutants of a body")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="bodies at a time")
    options = parser.parse_args()
    paths = [p for p in sorted(BODIES.glob("*.metal")) if not options.bodies or p.stem in options.bodies]
    with copy_of(ROOT) as root, ThreadPoolExecutor(options.jobs) as pool:
        found = [r for results in pool.map(lambda p: try_body(p, options.each, root), paths) for r in results]
    survivors = [m for m, result in found if not result]
    known = known_survivors()
    print(f"\n{len(found) - len(survivors)} of {len(found)} mutants of {len(paths)} bodies were caught")
    unknown = [f"{m.body}: {m.change}" for m in survivors if f"{m.body}: {m.change}" not in known]
    for line in unknown:
        print(f"survived without a reason: {line}")
    return 1 if unknown else 0


if __name__ == "__main__":
    raise SystemExit(main())
