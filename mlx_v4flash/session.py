"""The caches of a conversation and the tokens they hold: of each prompt only what is new is prefilled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .cache import LayerCache
from .engine import PREFILL_CHUNK, stream_tokens
from .model import Model

# Copies of the caches kept beside the live ones. A copy shares its bytes with them until they grow: then it has its
# own compressed rows, about 7 kB for each token of V4-Flash.
SNAPSHOTS = 4
SNAPSHOT_BYTES = 4 * 1024**3

Progress = Callable[[int, int], None]


@dataclass
class Held:
    """Caches, and the tokens they were filled with."""

    tokens: list[int]
    cache: list[LayerCache]

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt goes on from here; a prompt that ends here would leave nothing to compute logits from."""
        n = len(self.tokens)
        return n < len(prompt) and self.tokens == list(prompt[:n])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.cache)

    def copy(self) -> Held:
        return Held(list(self.tokens), [layer.copy() for layer in self.cache])


class Session:
    """Runs prompts one after the other, each from the longest beginning that the caches know.

    The caches cannot take tokens back, so a copy is kept where a later prompt may go another way: before the last
    token of every prompt, and after what `prefill` was given.

    Args:
        snapshots, snapshot_bytes: how many copies to keep, and how many bytes of them beside the newest. The one
            unused for longest goes first. A plan of memory may leave room for fewer.
        prefill_chunk: prompt tokens per forward pass.

    Attributes:
        cached_tokens: of the last prompt, the tokens that were not prefilled again.
    """

    def __init__(
        self,
        model: Model,
        *,
        snapshots: int = SNAPSHOTS,
        snapshot_bytes: int = SNAPSHOT_BYTES,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.model, self.prefill_chunk = model, prefill_chunk
        self.cached_tokens = 0
        self._keep, self._keep_bytes = snapshots, snapshot_bytes
        self._snapshots: list[Held] = []
        # What was generated last, to go on from; None while a forward pass runs, since an exception in the middle of
        # one leaves some layers ahead of others.
        self._live: Held | None = None

    def known(self, prompt: Sequence[int]) -> Held | None:
        """The caches that hold the longest beginning of a prompt."""
        found = [held for held in (*self._snapshots, self._live) if held is not None and held.begins(prompt)]
        return max(found, key=lambda held: len(held.tokens), default=None)

    def adopt(self, held: Held) -> None:
        """Start from these caches, forgetting all others."""
        self._snapshots, self._live = [held], None

    @property
    def held_tokens(self) -> int:
        """Tokens in the caches that were used last."""
        held = self._live or (self._snapshots[-1] if self._snapshots else None)
        return 0 if held is None else len(held.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the live caches and the copies; bytes that they share count once for each."""
        return sum(held.nbytes for held in (*self._snapshots, *([self._live] if self._live else [])))

    def prefill(self, prompt: Sequence[int], progress: Progress | None = None) -> int:
        """Fill the caches with a prompt and keep a copy; the number of tokens this took."""
        held = self._resume(prompt)
        for _ in self._run(prompt, held, 0, None, progress):
            raise AssertionError("asked for no token, got one")
        held.tokens = list(prompt)
        self._live = held
        self._remember(held.copy())
        return len(prompt) - self.cached_tokens

    def stream(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        sampler: Callable[[mx.array], mx.array] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[int]:
        """Generated tokens. Whoever stops reading leaves the caches with the tokens that were read.

        Args:
            progress: called between chunks with new prompt tokens done and in all. What it raises ends the run, and
                the chunks that are done stay in the caches.
        """
        held = self._resume(prompt)
        for token in self._run(prompt, held, max_tokens, sampler, progress):
            held.tokens.append(token)
            self._live = held
            yield token
            self._live = None
        self._live = held

    def _run(
        self,
        prompt: Sequence[int],
        held: Held,
        max_tokens: int,
        sampler: Callable[[mx.array], mx.array] | None,
        progress: Progress | None,
    ) -> Iterator[int]:
        start = self.cached_tokens

        def between_chunks(done: int, total: int) -> None:
            # The last call comes when the caches hold the first generated token, too, which is not known yet.
            if done < total:
                held.tokens = list(prompt[: start + done])
                self._live = held
            if done == total - 1 and max_tokens:
                self._remember(held.copy())
            if progress is not None:
                progress(done, total)
            held.tokens = list(prompt)
            self._live = None

        return stream_tokens(
            self.model,
            prompt[start:],
            max_tokens,
            sampler=sampler,
            prompt_cache=held.cache,
            prefill_chunk=self.prefill_chunk,
            prompt_progress=between_chunks,
        )

    def _resume(self, prompt: Sequence[int]) -> Held:
        """Caches to continue the prompt from. They are the caller's: what is kept here does not change with them."""
        held = self.known(prompt)
        if held is None:
            held = Held([], self.model.make_cache())
        elif held is not self._live:
            self._remember(held)
            held = held.copy()
        self.cached_tokens, self._live = len(held.tokens), None
        return held

    def _remember(self, held: Held) -> None:
        if not held.tokens:
            return
        kept, nbytes, most, plan = [held], 0, self._keep_bytes, self.model.plan
        if plan is not None:
            most = min(most, plan.parts["kept caches"] - held.nbytes)
        others = [h for h in self._snapshots if h.tokens != held.tokens]
        for other in others[::-1][: max(self._keep - 1, 0)]:
            nbytes += other.nbytes
            if nbytes > most:
                break
            kept.append(other)
        self._snapshots = kept[::-1]
