"""Texts to train on, all from Debian packages and the running Python: lists of documents, one list per source.

apt-get install bible-kjv bible-kjv-text fortunes fortunes-min dict-gcide wordnet-base dict-foldoc python3.11-doc
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

FORTUNES = Path("/usr/share/games/fortunes")
DICTIONARIES = Path("/usr/share/dictd")
WORDNET = Path("/usr/share/wordnet")
PYTHON_DOCS = Path("/usr/share/doc/python3.11/html/_sources")

# One document in this many of each source is never trained on.
HELD_OUT = 100


def bible() -> Iterator[str]:
    """Chapters of the King James Version."""
    out = subprocess.run(["bible", "-l100000", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    for chapter in re.split(r"\n\n(?=\w[\w ]* \d+\n\n)", "\n" + out.strip()):
        yield re.sub(r"\n\s+", "\n", chapter).strip()


def fortunes() -> Iterator[str]:
    for file in sorted(FORTUNES.iterdir()):
        if not file.suffix and file.is_file() and not file.is_symlink():
            for text in file.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
                yield re.sub(r"\t+", " ", text).strip()


def gcide() -> Iterator[str]:
    """Webster of 1913: entries, without the marks that say where each line is from."""
    for entry in re.split(r"\n(?=\S)", _gunzip(DICTIONARIES / "gcide.dict.dz")):
        entry = re.sub(r"\s*\[(1913 Webster|Webster 1913 Suppl\.|PJC|WordNet 1\.5|RP|RH|RDH|[^\]]*PJC)\]", "", entry)
        yield _unindent(entry)


def foldoc() -> Iterator[str]:
    for entry in re.split(r"\n(?=\S)", _gunzip(DICTIONARIES / "foldoc.dict.dz")):
        yield _unindent(re.sub(r"\n\s*\(\d{4}-\d\d-\d\d\)\s*$", "", entry.replace("{", "").replace("}", "")))


def wordnet() -> Iterator[str]:
    """Meanings, forty to a document."""
    lines = [f"{word} ({kind}): {gloss}" for word, kind, gloss in senses()]
    for n in range(0, len(lines), 40):
        yield "\n".join(lines[n : n + 40])


def senses() -> Iterator[tuple[str, str, str]]:
    """First word, kind and gloss of each of WordNet's meanings."""
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for part, kind in kinds.items():
        for line in (WORDNET / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                data, gloss = line.split(" | ", 1)
                yield re.sub(r"\(\w+\)", "", data.split()[4]).replace("_", " "), kind, gloss.strip()


def common_senses() -> list[tuple[str, str, str, int]]:
    """Single words, the most common first: word, kind, the gloss of its first meaning, and how often it was seen."""
    kinds = {"1": "noun", "2": "verb", "3": "adjective", "4": "adverb", "5": "adjective"}
    files = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
    glosses = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                glosses[part, line[:8]] = line.split(" | ", 1)[1].split(";")[0].strip()
    first = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"index.{part}").read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                first[part, fields[0]] = fields[-int(fields[2])]
    counts: dict[tuple[str, str], int] = {}
    for line in (WORDNET / "cntlist.rev").read_text().splitlines():
        key, sense, count = line.split()
        word, kind = key.split("%")
        if word.isalpha() and word.islower() and 2 < len(word) < 12:
            counts[word, kind[0]] = counts.get((word, kind[0]), 0) + int(count)
    best: dict[str, tuple[str, str, str, int]] = {}
    for (word, kind), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        offset = first.get((files[kind], word))
        if offset is not None and word not in best:
            best[word] = (word, kinds[kind], glosses[files[kind], offset], count)
    return list(best.values())


def python_docs() -> Iterator[str]:
    for file in sorted(PYTHON_DOCS.rglob("*.txt")):
        if "whatsnew" not in str(file):
            yield file.read_text(encoding="utf-8", errors="replace").strip()


def docstrings() -> Iterator[str]:
    """Of the running Python's standard library, those of one module to a document."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if any(part in ("test", "tests", "site-packages", "idlelib", "lib2to3") for part in file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found = [
            f"{node.name}: {text}"
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node))
        ]
        yield "\n\n".join(filter(None, [ast.get_docstring(tree), *found]))


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "bible": bible, "fortunes": fortunes, "gcide": gcide, "foldoc": foldoc, "wordnet": wordnet,
    "python_docs": python_docs, "docstrings": docstrings,
}  # fmt: skip


def documents(source: str, held_out: bool = False) -> list[str]:
    """Documents to train on, or those kept apart; which is which depends on a document's text alone."""
    texts = (text for text in SOURCES[source]() if len(text) > 20)
    return [text for text in texts if (_digest(text) % HELD_OUT == 0) == held_out]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _gunzip(path: Path) -> str:
    with gzip.open(path) as file:
        return file.read().decode("utf-8", errors="replace")


def _unindent(entry: str) -> str:
    return re.sub(r"\n +", "\n", re.sub(r"[ \t]+\n", "\n", entry)).strip()
