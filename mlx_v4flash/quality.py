"""How far a model's predictions are from those of another, token by token."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .config import ModelConfig
from .engine import wired
from .errors import ConvertError, NumericsError, RequestError
from .hub import resolve
from .journal import Journal, write_file
from .model import Model
from .passage import Array, Passage, Text
from .quality_report import Depth, Report
from .reference import Reference, decode, encode, log_softmax
from .run import Run

Progress = Callable[[int, int], None]
Progresses = Callable[[str], Any]  # a context manager with a Progress, for each model that is run

TOKENS, CONTEXT, CHUNK = 4096, 4096, 2048
_ROWS = 4  # worked on at once: more leave the processor's cache, which takes 8 times as long


def compare(
    model: str,
    against: str,
    text: Path,
    *,
    tokens: int | None = None,
    context: int | None = None,
    prefill_chunk: int | None = None,
    output: Path | None = None,
    save_reference: Path | None = None,
    progresses: Progresses,
    **loading: Any,
) -> Report:
    """Compare the predictions of a model with those of another over a text; one is in memory at a time.

    Args:
        model: folder or repository of the model that is judged.
        against: folder or repository of the other one, or a file that `save_reference` named before.
        tokens, context, prefill_chunk: see `Passage`; those of the file if there is one, else 4096, 4096 and 2048.
        output: where to write the report; an interrupted comparison with the same output continues.
        save_reference: keep what the other model thinks there. If absent it is removed at the end.
        progresses: makes a bar for each model that is run, given its name.
        loading: of `Run.load`.

    Raises:
        RequestError: a number out of range, a text or a model that does not fit, no space or place to write to.
        NumericsError: a model produced a value that is not a number.
    """
    given = {"tokens": tokens, "context": context, "prefill_chunk": prefill_chunk}
    with _workplace(output) as place, _explained(place):
        there = Path(against) if Path(against).is_file() else None
        if there and save_reference:
            raise RequestError(f"save_reference: expected none, as {there} is a reference, found {save_reference}")
        head = _head_of(there, given) if there else _head(against, text, given, loading)
        folder = resolve(model)
        words = Text.read(text, folder, head["tokens"])
        words.expect_same(head, text, folder)
        _expect_context(head, folder)
        path = save_reference or place.with_name(place.name + ".reference")
        reference = Reference.open(there) if there else _begin(path, head)
        journal = _journal(place, reference, folder, loading)
        if not reference.finished:
            _fill(reference, against, words, progresses, loading)
        nbytes = _judge(journal, reference, str(folder), words, progresses, loading)
        report = _report(journal, reference, model, nbytes)
        if output is not None:
            write_file(output, [report.json().encode() + b"\n"])
        journal.path.unlink()
        if not (there or save_reference):
            path.unlink()
        return report


def _head(against: str, text: Path, given: dict[str, int | None], loading: dict[str, Any]) -> dict[str, Any]:
    """What a reference made by this model will say of itself."""
    for name, value in given.items():
        if value is not None and value < 1:
            raise RequestError(f"{name}: expected 1 or more, found {value}")
    tokens, context, chunk = (g or d for g, d in zip(given.values(), (TOKENS, CONTEXT, CHUNK), strict=True))
    folder = resolve(against)
    words = Text.read(text, folder, tokens)
    head = {
        "model": against, "model_crc32": _fingerprint(folder), "loading": loading, "vocab_size": words.vocab_size,
        "ids_crc32": words.crc32, "tokens": len(words.ids), "context": context, "chunk": chunk,
    }  # fmt: skip
    _expect_context(head, folder)
    return head


def _head_of(path: Path, given: dict[str, int | None]) -> dict[str, Any]:
    """What a finished reference says of itself, which options may repeat."""
    head = Reference.open(path).head
    for (name, value), there in zip(given.items(), (head["tokens"], head["context"], head["chunk"]), strict=True):
        if value is not None and value != there:
            raise RequestError(f"{name}: expected {there} as in {path}, found {value}\nhint: leave the option out")
    return head


def _begin(path: Path, head: dict[str, Any]) -> Reference:
    reference = Reference.begin(path, head)
    needed, free = reference.nbytes - path.stat().st_size, shutil.disk_usage(path.parent).free
    if needed > free:
        raise RequestError(
            f"{path}: expected {needed / 1e9:.2f} GB of free space, found {free / 1e9:.2f} GB\n"
            "hint: free some space, or ask for fewer --tokens"
        )
    return reference


def _expect_context(head: dict[str, Any], folder: Path) -> None:
    limit, needed = ModelConfig.from_folder(folder).max_position_embeddings, min(head["context"], head["tokens"])
    if needed > limit:
        raise RequestError(f"context: expected at most {limit}, what {folder} was made for, found {needed}")


def _journal(place: Path, reference: Reference, folder: Path, loading: dict[str, Any]) -> Journal:
    """What is known of each chunk: a line with one value for each token."""
    head = {"reference": reference.head, "model_crc32": _fingerprint(folder), "loading": loading}
    path = place.with_name(place.name + ".journal")
    try:
        return Journal(path, head)
    except ConvertError as e:
        raise RequestError(
            f"{path}: expected a comparison of the same models and text, found one begun with others\n"
            "hint: run that one again, choose another output, or remove the file"
        ) from e


def _fill(reference: Reference, name: str, words: Text, progresses: Progresses, loading: dict[str, Any]) -> None:
    run = Run.load(name, revision=None, **loading)
    with progresses(f"reference {name}") as progress:
        for start, logits in _logits(run.model, words, reference.passage, reference.done, progress):
            targets = words.targets(start, start + logits.shape[0])
            reference.append(encode(logits[rows], targets[rows]) for rows in _slices(logits))


def _judge(
    journal: Journal, reference: Reference, name: str, words: Text, progresses: Progresses, loading: dict[str, Any]
) -> int:
    """Fill the journal; bytes of the model."""
    done = len(journal.units)
    if done == len(reference.passage.spans):
        return int(journal.units[str(done - 1)]["model_bytes"])
    gc.collect()  # the other model
    mx.clear_cache()
    run = Run.load(name, revision=None, **loading)
    with progresses(f"judging {name}") as progress:
        for start, logits in _logits(run.model, words, reference.passage, done, progress):
            records, targets = reference.block(done), words.targets(start, start + logits.shape[0])
            found = [_scores(records[rows], logits[rows], targets[rows]) for rows in _slices(logits)]
            columns = {key: np.concatenate([part[key] for part in found]).tolist() for key in found[0]}
            journal.finish(str(done), {"model_bytes": run.load_bytes, **columns})
            done += 1
    return run.load_bytes


def _slices(logits: Array) -> list[slice]:
    return [slice(i, i + _ROWS) for i in range(0, len(logits), _ROWS)]


def _scores(records: Array, logits: Array, targets: Array) -> dict[str, Array]:
    """One value for each of T tokens: divergence, whether the most likely token is the same, log-probabilities."""
    theirs, ours = decode(records), log_softmax(logits)
    return {
        "divergence": np.maximum((np.exp(theirs) * (theirs - ours)).sum(axis=1), 0),  # -1e-17 by rounding
        "same_top": ours.argmax(axis=1) == records["top"],
        "reference_logprob": records["chosen"],
        "model_logprob": np.take_along_axis(ours, targets[:, None], axis=1)[:, 0],
    }


def _logits(model: Model, words: Text, passage: Passage, done: int, progress: Progress) -> Iterator[tuple[int, Array]]:
    """First token and logits [T, V] of every chunk that is not done; the model reads what precedes it again.

    Raises:
        NumericsError: a logit is not finite.
    """
    first = passage.spans[done][0] if done < len(passage.spans) else passage.tokens
    first -= first % passage.context
    with wired(model):
        for number, (start, stop) in enumerate(passage.spans):
            if start < first:
                continue
            if start % passage.context == 0:
                cache = model.make_cache()
            logits = model(words.inputs(start, stop, passage.context), cache)[0]
            if number < done:
                mx.eval([c.state for c in cache])
            else:
                if not mx.isfinite(logits).all().item():
                    raise NumericsError(
                        f"logits of tokens {start} to {stop - 1}: expected finite values, found NaN or infinity\n"
                        "hint: generate --raw with the same text names the layer"
                    )
                yield start, np.array(logits)
            progress(stop, passage.tokens)


def _report(journal: Journal, reference: Reference, model: str, nbytes: int) -> Report:
    lines = [journal.units[str(n)] for n in range(len(reference.passage.spans))]
    names = ("divergence", "same_top", "reference_logprob", "model_logprob")
    columns = {name: np.array([x for line in lines for x in line[name]], np.float64) for name in names}
    depth = np.arange(reference.passage.tokens) % reference.passage.context + 1  # tokens before, the first included
    depths, low = [], 0
    for high in _edges(int(depth.max())):
        within = (depth > low) & (depth <= high)
        depths.append(Depth.of(low + 1, high, {name: column[within] for name, column in columns.items()}))
        low = high
    return Report(
        model=model,
        against=reference.head["model"],
        model_bytes=nbytes,
        ids_crc32=reference.head["ids_crc32"],
        **dataclasses.asdict(reference.passage),
        all=Depth.of(1, low, columns),
        depths=depths,
    )


def _edges(deepest: int) -> list[int]:
    """Ends of the ranges of depth: 128, the window, then four times as much each time."""
    edges = [128]
    while edges[-1] < deepest:
        edges.append(4 * edges[-1])
    return [*edges[:-1], deepest]


@contextmanager
def _workplace(output: Path | None) -> Iterator[Path]:
    """The path beside which things are kept on the way."""
    if output is not None:
        if not output.parent.is_dir():
            raise RequestError(f"{output}: expected a place in an existing folder\nhint: make {output.parent}")
        yield output
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "quality"


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise RequestError(
            f"{e.filename or place}: {e.strerror}\n"
            "hint: check the space of the disk and permissions, and run the same command again; it continues"
        ) from e


def _fingerprint(folder: Path) -> int:
    """Changes when a file of the folder does."""
    # Finder writes hidden files when it shows a folder.
    paths = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return zlib.crc32(repr(sorted(files)).encode())
