"""Training by processes of one thread each, on shared parameters; stops anywhere, goes on from its last state."""

from __future__ import annotations

import csv
import ctypes
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from mlx_v4flash.config import ModelConfig

from .data import Array, Corpus, Mix
from .layers import Training
from .model import Nano
from .optimizer import Slot, kind_of, update
from .recipe import BALANCE, CONFIG, INDEX_LOSS, PHASES, SEED, Phase, phase_at, tokens_before

Batches = Callable[[Mix, int, tuple[int, ...]], tuple[Array, Array]]

SAVE_EVERY_S = 240
COLUMNS = ["step", "tokens", "text", "chat", "index", "largest_expert", "smallest_expert", "rate", "cpu_s", "wall_s"]


class Shared:
    """Model, optimizer state and gradients in memory that all processes see.

    Args:
        settings: config.json of the model.
        frequency: how often each token was counted, [V]; from it the experts of the hash-routed layers follow.
        folder: where a state is looked for, to go on from.
    """

    def __init__(self, processes: int, settings: dict[str, Any], frequency: Tensor, folder: Path) -> None:
        torch.manual_seed(SEED)
        self.model = Nano(ModelConfig.from_dict(settings, "recipe"))
        for layer in self.model.layers:
            if layer.ffn.gate.hashed:
                layer.ffn.gate.tid2eid.copy_(balanced(frequency, self.model.c))
        parameters = dict(self.model.named_parameters())
        self.first = {n: torch.zeros_like(p, requires_grad=False) for n, p in parameters.items()}
        self.second = {n: torch.zeros_like(p.data) for n, p in parameters.items() if kind_of(n) != "matrix"}
        self.gradients = [{n: torch.zeros_like(p.data) for n, p in parameters.items()} for _ in range(processes)]
        c = self.model.c
        self.counts = [torch.zeros(c.num_hidden_layers, c.n_routed_experts) for _ in range(processes)]
        self.losses, self.stop = torch.zeros(processes, 3), torch.zeros(1)
        self.step, self.cpu_s = 0, 0.0
        state = folder / "state.pt"
        if state.exists():
            self._load(torch.load(state, weights_only=True))
        for tensor in [*self.first.values(), *self.second.values(), *self.counts, self.losses, self.stop]:
            tensor.share_memory_()
        for gradients in self.gradients:
            for tensor in gradients.values():
                tensor.share_memory_()
        self.model.share_memory()

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for mine, theirs in ((self.first, state["first"]), (self.second, state["second"])):
            for name, tensor in theirs.items():
                mine[name].copy_(tensor)
        self.step, self.cpu_s = state["step"], state["cpu_s"]

    def save(self, folder: Path, step: int, cpu_s: float) -> None:
        state = {"model": self.model.state_dict(), "first": self.first, "second": self.second}
        torch.save({**state, "step": step, "cpu_s": cpu_s}, folder / "state.new")
        os.replace(folder / "state.new", folder / "state.pt")

    def slots(self, process: int, processes: int) -> list[Slot]:
        """Parameters that this process updates: those of every so-manieth layer."""
        out = []
        for name, p in self.model.named_parameters():
            parts = name.split(".")
            owner = int(parts[1]) if parts[0] == "layers" else len(parts[0])
            if owner % processes == process:
                gradients = [g[name] for g in self.gradients]
                out.append(Slot(name, p.data, self.first[name], self.second.get(name), gradients))
        return out


def token_frequency(data: Path, vocab_size: int) -> Tensor:
    """How often each token occurs at the beginnings of the sources, plus one."""
    texts = [np.load(file, mmap_mode="r") for file in sorted(data.glob("*.npy")) if "held_out" not in file.name]
    return torch.from_numpy(sum(np.bincount(t[:1_000_000], minlength=vocab_size) for t in texts) + 1.0)


def balanced(frequency: Tensor, c: ModelConfig) -> Tensor:
    """Distinct experts for each token [V, A], the least used of a random few going to the most frequent token."""
    E, A = c.n_routed_experts, c.num_experts_per_tok
    load, table = torch.zeros(E, dtype=torch.float64), torch.zeros(c.vocab_size, A, dtype=torch.int64)
    for token in frequency.argsort(descending=True).tolist():
        some = torch.randperm(E)[: 2 * A]
        picks = some[load[some].argsort()[:A]]
        load[picks] += frequency[token]
        table[token] = picks
    return table


def loss_of(head: Tensor, h: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each target [n], and their weighted sum."""
    logits = (h.to(torch.bfloat16) @ head.to(torch.bfloat16).T).float()
    each = F.cross_entropy(logits, targets, reduction="none")
    return each.detach(), (each * weights).sum()


class Worker:
    """One process: its share of each batch, its share of the parameters.

    Args:
        barrier: at which the processes wait for each other.
        batches: tokens and weights of a step, given its mix, rows and seed.
        stop_s: seconds after which all stop, with the state saved.
        compiled: whether layers are compiled, which takes minutes and makes steps three times faster.
    """

    def __init__(
        self, rank: int, processes: int, shared: Shared, barrier: Any, folder: Path, batches: Batches,
        phases: Sequence[Phase] = PHASES, stop_s: float = 1e9, compiled: bool = True,
    ) -> None:  # fmt: skip
        self.rank, self.processes, self.shared, self.barrier = rank, processes, shared, barrier
        self.folder, self.stop_at = folder, time.monotonic() + stop_s
        self.batches, self.phases, self.compiled = batches, phases, compiled
        self.slots = shared.slots(rank, processes)
        self.loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
        self.phase: Phase | None = None
        # All go when the process that started them goes.
        self.parent = os.getppid()
        for name, p in shared.model.named_parameters():
            p.grad = shared.gradients[rank][name]

    def run(self) -> None:
        cpu_s, wall, saved = self.shared.cpu_s, time.monotonic(), time.monotonic()
        for step in range(self.shared.step, self.phases[-1].until):
            began = time.process_time()
            row = self._step(step)
            # A step's time of one process stands for all.
            cpu_s += (time.process_time() - began) * self.processes
            if self.rank == 0:
                now = time.monotonic()
                self._log({**row, "cpu_s": round(cpu_s, 1), "wall_s": round(now - wall, 2)})
                wall = now
                if now - saved > SAVE_EVERY_S or step + 1 == self.phases[-1].until:
                    self.shared.save(self.folder, step + 1, cpu_s)
                    saved = now
                if now > self.stop_at:
                    self.shared.save(self.folder, step + 1, cpu_s)
                    self.shared.stop.fill_(1)
            self.barrier.wait()
            if self.shared.stop or os.getppid() != self.parent:
                return

    def _step(self, step: int) -> dict[str, Any]:
        phase, rate = phase_at(step, self.phases)
        tokens, weights = map(torch.from_numpy, self.batches(phase.mix, phase.rows, (SEED, step)))
        if self.compiled and phase is not self.phase:
            self._compile(phase)
        self._clear()
        self._backward(tokens, weights, phase)
        self.barrier.wait()
        with torch.no_grad():
            counts = sum(self.shared.counts)
            update(self.slots, step, rate)
            if self.rank == 0:
                self._balance(counts)
        row = self._row(step, rate, counts)
        self.barrier.wait()
        return row

    def _row(self, step: int, rate: float, counts: Tensor) -> dict[str, Any]:
        """What the log says of a step; the uses of experts are relative to their mean."""
        text, chat, index = self.shared.losses.sum(0).tolist()
        if not math.isfinite(text + chat + index):
            raise FloatingPointError(f"step {step + 1}: expected finite losses, found {text}, {chat}, {index}")
        used = counts[self.shared.model.c.num_hash_layers :]
        used = used / used.mean(1, keepdim=True) if len(used) else counts.new_ones(1, 1)
        return {
            "step": step + 1, "tokens": tokens_before(step + 1, self.phases), "text": round(text, 4),
            "chat": round(chat, 4), "index": round(index, 4), "largest_expert": round(used.max().item(), 3),
            "smallest_expert": round(used.min().item(), 3), "rate": round(rate, 4),
        }  # fmt: skip

    def _compile(self, phase: Phase) -> None:
        """Compiled code is for one shape; the first process leaves it for the others on disk."""
        torch._dynamo.reset()
        for layer in self.shared.model.layers:
            layer.compile(dynamic=False)
        if self.rank == 0:
            ids = torch.zeros(phase.rows, phase.mix.length + 1, dtype=torch.int64)
            self._backward(ids, torch.ones(ids.shape), phase)
        self.barrier.wait()
        self.phase = phase
        self._clear()

    def _clear(self) -> None:
        for gradient in self.shared.gradients[self.rank].values():
            gradient.zero_()

    def _backward(self, tokens: Tensor, weights: Tensor, phase: Phase) -> None:
        """Gradients of this process's rows; losses are means over the whole batch."""
        how = Training(sparse=phase.sparse, rounding=phase.rounding)
        is_text = (weights == 1).all(1)
        total, model = weights[:, 1:].sum(), self.shared.model
        chat_words = ((weights == 1) & ~is_text[:, None])[:, 1:]
        mine = slice(self.rank, None, self.processes)
        ids, targets = tokens[mine, :-1].contiguous(), tokens[mine, 1:]
        h, index, counts = model(ids, how)
        each, loss = self.loss(model.head.weight, h.flatten(0, 1), targets.flatten(), weights[mine, 1:].flatten())
        (loss / total + INDEX_LOSS * index.sum() / self.processes).backward()
        each = each.view(targets.shape)
        self.shared.counts[self.rank].copy_(counts)
        csa = max(1, sum(r == 4 for r in model.c.compress_ratios))
        text = each[is_text[mine]].sum() / max(1, int(is_text.sum()) * targets.shape[1])
        chat = each[chat_words[mine]].sum() / chat_words.sum().clamp(min=1)
        self.shared.losses[self.rank] = torch.stack([text, chat, index.detach().sum() / csa / self.processes])

    def _balance(self, counts: Tensor) -> None:
        for layer, used in zip(self.shared.model.layers, counts, strict=True):
            if not layer.ffn.gate.hashed:
                layer.ffn.gate.bias += BALANCE * torch.sign(used.mean() - used)

    def _log(self, row: dict[str, Any]) -> None:
        path = self.folder / "log.csv"
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerow(row)


def trim_log(log: Path, step: int) -> None:
    """Drop the lines of steps that were taken after the state was saved, and will be taken again."""
    if log.exists():
        head, *rows = log.read_text().splitlines(keepends=True)
        log.write_text(head + "".join(row for row in rows if int(row.split(",")[0]) <= step))


def work(rank: int, processes: int, shared: Shared, barrier: Any, folder: Path, stop_s: float) -> None:
    # Large blocks stay with the process: giving them back costs a page fault for every 4 KiB of each step.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 30)
    libc.mallopt(-1, (1 << 31) - 1)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch._dynamo.config.recompile_limit = 64
    batches = Corpus.from_folder(folder / "data").batch
    Worker(rank, processes, shared, barrier, folder, batches, stop_s=stop_s).run()


def train(folder: Path, processes: int, stop_s: float) -> None:
    """Go on until the recipe ends or for so many seconds; data must have been prepared in the folder."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
    os.environ["OMP_NUM_THREADS"] = "1"
    frequency = token_frequency(folder / "data", CONFIG["vocab_size"])
    shared = Shared(processes, CONFIG, frequency, folder)
    trim_log(folder / "log.csv", shared.step)
    barrier = mp.get_context("spawn").Barrier(processes)
    mp.spawn(work, (processes, shared, barrier, folder, stop_s), nprocs=processes)
