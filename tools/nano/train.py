"""Training by processes of one thread each, on shared parameters; stops anywhere, goes on from its last state."""

from __future__ import annotations

import csv
import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from mlx_v4flash.config import ModelConfig

from .data import Corpus
from .model import Nano, Training
from .optimizer import Slot, kind_of, update
from .recipe import BALANCE, CONFIG, INDEX_LOSS, PHASES, SEED, Phase, phase_at

SAVE_EVERY_S = 240
COLUMNS = ["step", "tokens", "text", "chat", "index", "largest_expert", "smallest_expert", "rate", "cpu_s", "wall_s"]


class Shared:
    """Model, optimizer state and gradients in memory that all processes see."""

    def __init__(self, processes: int, folder: Path) -> None:
        torch.manual_seed(SEED)
        self.model = Nano(ModelConfig.from_dict(CONFIG, "recipe"))
        set_hash_tables(self.model, folder / "data")
        parameters = dict(self.model.named_parameters())
        self.first = {n: torch.zeros_like(p, requires_grad=False) for n, p in parameters.items()}
        self.second = {n: torch.zeros_like(p.data) for n, p in parameters.items() if kind_of(n) != "matrix"}
        self.gradients = [{n: torch.zeros_like(p.data) for n, p in parameters.items()} for _ in range(processes)]
        self.counts = [torch.zeros(CONFIG["num_hidden_layers"], CONFIG["n_routed_experts"]) for _ in range(processes)]
        self.losses = torch.zeros(processes, 3)
        self.step, self.cpu_s = 0, 0.0
        state = folder / "state.pt"
        if state.exists():
            self._load(torch.load(state, weights_only=True))
        for tensor in [*self.first.values(), *self.second.values(), *self.counts, self.losses]:
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


def set_hash_tables(model: Nano, data: Path) -> None:
    """Experts of each token, such that all experts of a layer see about the same number of tokens."""
    texts = [np.load(file, mmap_mode="r") for file in sorted(data.glob("*.npy")) if "held_out" not in file.name]
    frequency = sum(np.bincount(t[:1_000_000], minlength=model.c.vocab_size) for t in texts) + 1.0
    for layer in model.layers:
        if layer.ffn.gate.hashed:
            layer.ffn.gate.tid2eid.copy_(balanced(torch.from_numpy(frequency), model.c))


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
    """One process: its share of each batch, its share of the parameters."""

    def __init__(self, rank: int, processes: int, shared: Shared, barrier: Any, folder: Path, stop_s: float) -> None:
        self.rank, self.processes, self.shared, self.barrier = rank, processes, shared, barrier
        self.folder, self.stop_at = folder, time.monotonic() + stop_s
        self.corpus = Corpus(folder / "data")
        self.slots = shared.slots(rank, processes)
        self.loss = torch.compile(loss_of, dynamic=False)
        self.phase: Phase | None = None
        for name, p in shared.model.named_parameters():
            p.grad = shared.gradients[rank][name]

    def run(self) -> None:
        cpu_s, wall, saved = self.shared.cpu_s, time.monotonic(), time.monotonic()
        for step in range(self.shared.step, PHASES[-1].until):
            began = time.process_time()
            row = self._step(step)
            # A step's time of one process stands for all.
            cpu_s += (time.process_time() - began) * self.processes
            if self.rank == 0:
                now = time.monotonic()
                self._log({**row, "cpu_s": round(cpu_s, 1), "wall_s": round(now - wall, 2)})
                wall = now
                if now - saved > SAVE_EVERY_S or step + 1 == PHASES[-1].until:
                    self.shared.save(self.folder, step + 1, cpu_s)
                    saved = now
            if self.rank == 0 and time.monotonic() > self.stop_at:
                self.shared.losses.fill_(torch.nan)
            self.barrier.wait()
            if self.shared.losses.isnan().any():
                if self.rank == 0:
                    self.shared.save(self.folder, step + 1, cpu_s)
                return

    def _step(self, step: int) -> dict[str, Any]:
        phase, rate = phase_at(step)
        how = Training(sparse=phase.sparse, rounding=phase.rounding)
        tokens, weights = map(torch.from_numpy, self.corpus.batch(phase.mix, phase.rows, (SEED, step)))
        if phase is not self.phase:
            self._compile(phase)
        for gradient in self.shared.gradients[self.rank].values():
            gradient.zero_()
        self._backward(tokens, weights, how)
        self.barrier.wait()
        with torch.no_grad():
            counts = sum(self.shared.counts)
            update(self.slots, step, rate)
            if self.rank == 0:
                self._balance(counts)
        text, chat, index = self.shared.losses.sum(0).tolist()
        share = counts[CONFIG["num_hash_layers"] :]
        share = share / share.mean(1, keepdim=True)
        done = sum(
            max(0, min(step + 1, p.until) - start) * p.rows * p.mix.length
            for start, p in zip([0, *(p.until for p in PHASES)], PHASES, strict=False)
        )
        self.barrier.wait()
        return {
            "step": step + 1, "tokens": done, "text": round(text, 4), "chat": round(chat, 4),
            "index": round(index, 4), "largest_expert": round(share.max().item(), 3),
            "smallest_expert": round(share.min().item(), 3), "rate": round(rate, 4),
        }  # fmt: skip

    def _compile(self, phase: Phase) -> None:
        """Compiled code is for one shape; the first process leaves it for the others on disk."""
        torch._dynamo.reset()
        for layer in self.shared.model.layers:
            layer.compile(dynamic=False)
        for turn in range(self.processes):
            if turn == self.rank and turn == 0:
                rows = phase.rows // self.processes
                ids = torch.zeros(rows, phase.mix.length + 1, dtype=torch.int64)
                weights = torch.ones(ids.shape)
                self._backward(ids.repeat(self.processes, 1), weights.repeat(self.processes, 1), _how(phase))
            self.barrier.wait()
        self.phase = phase

    def _backward(self, tokens: Tensor, weights: Tensor, how: Training) -> None:
        """Gradients of this process's rows; losses are means over the whole batch."""
        is_text = (weights == 1).all(1)
        total, model = weights[:, 1:].sum(), self.shared.model
        chat_words = ((weights == 1) & ~is_text[:, None])[:, 1:]
        counted = [is_text.sum() * (tokens.shape[1] - 1), chat_words.sum()]
        mine = slice(self.rank, None, self.processes)
        ids, targets = tokens[mine, :-1].contiguous(), tokens[mine, 1:]
        h, index, counts = model(ids, how)
        each, loss = self.loss(model.head.weight, h.flatten(0, 1), targets.flatten(), weights[mine, 1:].flatten())
        (loss / total + INDEX_LOSS * index.sum() / self.processes).backward()
        each = each.view(targets.shape)
        self.shared.counts[self.rank].copy_(counts)
        csa = sum(r == 4 for r in CONFIG["compress_ratios"])
        self.shared.losses[self.rank] = torch.stack(
            [each[is_text[mine]].sum() / counted[0].clamp(min=1), each[chat_words[mine]].sum() / counted[1].clamp(min=1),
             index.detach().sum() / csa / self.processes]
        )  # fmt: skip

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


def _how(phase: Phase) -> Training:
    return Training(sparse=phase.sparse, rounding=phase.rounding)


def work(rank: int, processes: int, shared: Shared, barrier: Any, folder: Path, stop_s: float) -> None:
    # Large blocks stay with the process: giving them back costs a page fault for every 4 KiB of each step.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 30)
    libc.mallopt(-1, (1 << 31) - 1)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch._dynamo.config.recompile_limit = 64
    Worker(rank, processes, shared, barrier, folder, stop_s).run()


def train(folder: Path, processes: int, stop_s: float) -> None:
    """Go on until the recipe ends or for so many seconds; data must have been prepared in the folder."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
    os.environ["OMP_NUM_THREADS"] = "1"
    shared, barrier = Shared(processes, folder), mp.get_context("spawn").Barrier(processes)
    mp.spawn(work, (processes, shared, barrier, folder, stop_s), nprocs=processes)
