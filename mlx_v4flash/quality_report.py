"""What comparisons of models found: figures, a table, a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from .errors import RequestError


@dataclass(frozen=True)
class Depth:
    """Figures over the tokens with so many tokens before them.

    Args:
        kld: mean over tokens of the KL divergence of the model from the reference, in nats.
        kld_error: its standard error, as if tokens were independent.
        kld_p99: the divergence that 1 % of the tokens exceed.
        same_top: share of tokens where both models find the same one most likely.
        perplexity, reference_perplexity: of the model and of the reference, on the text.
    """

    first: int
    last: int
    tokens: int
    kld: float
    kld_error: float
    kld_p99: float
    kld_max: float
    same_top: float
    perplexity: float
    reference_perplexity: float

    @classmethod
    def of(cls, first: int, last: int, columns: dict[str, np.ndarray]) -> Depth:
        """From one value for each token of what `quality` measures."""
        divergence = columns["divergence"]
        count = len(divergence)
        return cls(
            first=first,
            last=last,
            tokens=count,
            kld=float(divergence.mean()),
            kld_error=float(divergence.std(ddof=1) / count**0.5) if count > 1 else 0.0,
            kld_p99=float(np.percentile(divergence, 99)),
            kld_max=float(divergence.max()),
            same_top=float(columns["same_top"].mean()),
            perplexity=float(np.exp(-columns["model_logprob"].mean())),
            reference_perplexity=float(np.exp(-columns["reference_logprob"].mean())),
        )


@dataclass(frozen=True)
class Report:
    """One model compared with another.

    Args:
        model_bytes: of the weights that were loaded.
        ids_crc32: of the text's tokens.
        tokens, context, chunk: how the text was read.
        all, depths: figures over the whole text, and over ranges of depth.
    """

    model: str
    against: str
    model_bytes: int
    ids_crc32: int
    tokens: int
    context: int
    chunk: int
    all: Depth
    depths: list[Depth]

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises RequestError if the file is no report."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["all"] = Depth(**values["all"])
            values["depths"] = [Depth(**depth) for depth in values["depths"]]
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise RequestError(
                f"{path}: expected a file that quality --output wrote, found {e!r}\nhint: name another file"
            ) from e

    def table(self) -> str:
        table = Table("depth", "tokens", "KLD, nats", "99 %", "same top", "perplexity", "of the reference")
        for d in [*self.depths, self.all]:
            table.add_row(
                "all" if d is self.all else f"{d.first:,} - {d.last:,}",
                f"{d.tokens:,}",
                f"{d.kld:.6f} ± {d.kld_error:.6f}",
                f"{d.kld_p99:.6f}",
                f"{d.same_top:.2%}",
                f"{d.perplexity:.4f}",
                f"{d.reference_perplexity:.4f}",
            )
        out = io.StringIO()
        Console(file=out, width=100).print(table)
        return out.getvalue() + f"{self.model}, {self.model_bytes / 1e9:.2f} GB, against {self.against}"


def plot(reports: Sequence[Report], output: Path) -> None:
    """Divergence over size, a point for each model.

    Raises:
        RequestError: matplotlib is absent, the reports are of different references, or the file cannot be written.
    """
    kinds = sorted({f"{r.tokens} tokens (CRC-32 {r.ids_crc32:08x}) against {r.against}" for r in reports})
    if len(kinds) > 1:
        raise RequestError(
            f"results: expected comparisons with one model over one text, found {' and '.join(kinds)}\n"
            "hint: plot those that belong together"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise RequestError("plot: expected matplotlib, found none\nhint: run `pip install 'mlx-v4flash[plot]'`") from e
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [r.model_bytes / 1e9 for r in reports],
        [r.all.kld for r in reports],
        yerr=[r.all.kld_error for r in reports],
        fmt="o",
        capsize=3,
        clip_on=False,  # a point at 0 is a whole one
    )
    for r in reports:
        below = any(other.model_bytes == r.model_bytes and other.all.kld > r.all.kld for other in reports)
        place, point = (0, -16 if below else 8), (r.model_bytes / 1e9, r.all.kld)
        axes.annotate(
            Path(r.model).name, point, xytext=place, textcoords="offset points", ha="center", fontsize="x-small"
        )
    axes.margins(x=0.1)
    axes.set(
        xlabel="weights, GB",
        ylabel="mean KL divergence, nats",
        title=f"against {Path(reports[0].against).name}, {reports[0].tokens:,} tokens",
    )
    if all(r.all.kld > 0 for r in reports):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as e:
        raise RequestError(f"{output}: cannot be written: {e}\nhint: choose another place, such as plot.png") from e
