"""What the command `plan` plans: a folder, a repository of which only config.json is needed, or the sizes alone."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub

from . import plan_report
from .checkpoint import Checkpoint
from .config import ModelConfig
from .converted import Converted, is_converted
from .errors import HubError, RequestError
from .experts.attach import open_source
from .experts.calibration import measure
from .experts.pool import record_bytes
from .experts.trace import Trace, read_trace
from .hub import FAILURES, explain, is_repository
from .memory import parse_bytes
from .plan import Plan, Sizes, make_plan, sizes_of
from .tiny import REAL


def planned(
    model: str | None,
    *,
    revision: str | None,
    memory: str | None,
    max_context: int | None,
    prefill_chunk: int,
    trace: Path | None,
    disk: str | None,
    bandwidth: str | None,
    as_json: bool,
) -> tuple[str, bool]:
    """Text of a plan, and whether it fits; `model` None plans V4-Flash itself.

    Raises:
        ConfigError, CheckpointError, HubError, RequestError: what is wrong, and what to do.
    """
    given_disk, given_bandwidth = parse_bytes(disk, "disk"), parse_bytes(bandwidth, "bandwidth")
    config, sizes, measured = _sizes(model, revision, measure_disk=given_disk is None)
    routing: Trace | None = None if trace is None else read_trace(trace)
    if routing is not None:
        _expect_same_sizes(routing, config, str(trace))
    speeds = given_disk or measured, given_bandwidth or plan_report.measure_bandwidth()
    machine = plan_report.Machine(config, sizes, routing, *speeds)

    def plan_for(budget: int | str | None) -> Plan:
        return make_plan(config, sizes, memory=budget, max_context=max_context, chunk=prefill_chunk)

    plan = plan_for(memory)
    if as_json:
        return json.dumps(plan_report.values(plan, machine, plan_for), indent=2), plan.fits
    return plan_report.table(plan, machine, plan_for), plan.fits


def _sizes(model: str | None, revision: str | None, measure_disk: bool) -> tuple[ModelConfig, Sizes, float | None]:
    """Config, bytes of weights, and bytes/s of the disk if files are there."""
    if model is None:
        config = ModelConfig.from_dict(REAL)
        return config, sizes_of(config), None
    folder = Path(model).expanduser()
    if not folder.exists() and is_repository(model):
        try:
            found = Path(huggingface_hub.hf_hub_download(model, "config.json", revision=revision))
        except FAILURES as e:
            raise HubError(f"{explain(model, revision, e)}\nhint: --real plans V4-Flash without any file") from e
        config = ModelConfig.from_folder(found.parent)
        return config, sizes_of(config), None
    checkpoint = Converted.open(folder) if is_converted(folder) else Checkpoint.open(folder)
    source = open_source(checkpoint)
    record = max(map(record_bytes, source.shapes))
    speed = None
    if measure_disk and source.paths[0].stat().st_size >= record:
        speed = max((choice.bytes_per_s or 0.0 for choice in measure(source.paths[0], record)), default=None)
    return checkpoint.config, sizes_of(checkpoint.config, checkpoint, source.shapes), speed


def _expect_same_sizes(trace: Trace, config: ModelConfig, file: str) -> None:
    expected = config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok
    if (trace.layers, trace.experts, trace.chosen) != expected:
        raise RequestError(
            "{}: expected a trace of {} layers with {} experts, {} chosen, found one of {} layers with {}, {}\n"
            "hint: record one with this model (--trace), or leave it out".format(
                file, *expected, trace.layers, trace.experts, trace.chosen
            )
        )
