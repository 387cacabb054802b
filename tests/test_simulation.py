"""Traces read back, and what would have been found in memory."""

from __future__ import annotations

import itertools
import json
import sys

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_v4flash.cli import main
from mlx_v4flash.errors import DeviceError, RequestError
from mlx_v4flash.experts.simulation import POLICIES, curves, hit_rate, synthetic
from mlx_v4flash.experts.trace import Trace, TraceWriter, read_trace


def write(path, trace):
    lines = [{"format": "mlx_v4flash.trace", "version": 1, "layers": trace.layers, "experts": trace.experts,
              "chosen": trace.chosen}]  # fmt: skip
    lines += [{"tokens": t, "experts": p} for t, p in zip(trace.tokens, trace.passes, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_what_was_written_is_read(tmp_path):
    writer = TraceWriter(tmp_path / "t", 2, 8, 2)
    for ids in ([[[3, 1], [1, 7]], [[0, 1], [0, 1]]], [[[5, 4]], [[2, 6]]]):
        writer.start()
        for layer in ids:
            writer.add(mx.array(layer))
        writer.end()
    assert read_trace(tmp_path / "t") == Trace(2, 8, 2, [2, 1], [[[1, 3, 7], [0, 1]], [[4, 5], [2, 6]]])


GOOD = '{"format": "mlx_v4flash.trace", "version": 1, "layers": 2, "experts": 8, "chosen": 2}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected"),
        ("[]", "line 1: expected"),
        (GOOD.replace("1,", "2,", 1), '"version": 1'),
        (GOOD.replace("8", '"8"'), "whole and positive"),
        (GOOD.replace("8", "1"), "whole and positive"),
        (GOOD + '{"tokens": 1, "experts": [[1, 2]', "line 2: expected tokens"),
        (GOOD + '{"tokens": 1, "experts": [[1, 2]]}', "experts of 2 layers"),
        (GOOD + '{"tokens": 2, "experts": [[1, 2, 3, 4], [1, 2]]}', "layer 1: expected a list of 4"),
        (GOOD + '{"tokens": 1, "experts": [[1, 2], [1, 8]]}', "layer 1: expected experts below 8, found 8"),
        (GOOD + '{"tokens": 1, "experts": [[1, true], [1, 2]]}', "layer 0: expected experts below 8, found True"),
    ],
)
def test_damage_is_named(tmp_path, text, message):
    (tmp_path / "t").write_text(text)
    with pytest.raises(RequestError, match=f"t: .*{message}" if "t: " not in message else message):
        read_trace(tmp_path / "t")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "t").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="cannot be read"):
        read_trace(tmp_path / "t")


def test_hits_counted_by_hand():
    trace = Trace(1, 4, 1, [1] * 6, [[[e]] for e in (0, 1, 2, 0, 1, 1)])
    assert hit_rate(trace, 2, POLICIES["LRU"]) == 1 / 6  # only the last use
    assert hit_rate(trace, 2, POLICIES["Belady"]) == 2 / 6  # 2 takes the place of 1, which takes that of 0 or 2
    assert hit_rate(trace, 3, POLICIES["LRU"]) == 3 / 6


def test_a_pass_with_more_experts_than_slots():
    trace = Trace(1, 4, 1, [3, 1, 1], [[[0, 1, 2]], [[0]], [[2]]])
    assert hit_rate(trace, 2, POLICIES["LRU"]) == 1 / 5  # 0 and 1 were kept


def test_more_memory_and_knowing_the_future_help():
    found = curves(synthetic(2, 64, 4, 300))
    for rates in found.rates.values():
        assert all(a <= b + 0.01 for a, b in itertools.pairwise(rates))
    for name in ("LRU", "LFU"):
        assert all(r <= best for r, best in zip(found.rates[name], found.rates["Belady"], strict=True))
    assert len({rates[-1] for rates in found.rates.values()}) == 1  # everything fits: first uses alone miss


@pytest.mark.parametrize(("slots", "published"), [(14, 0.405), (28, 0.594), (56, 0.744), (113, 0.865), (228, 0.91)])
def test_synthetic_resembles_what_was_published(slots, published):
    assert abs(hit_rate(synthetic(2, 256, 6, 430), slots, POLICIES["LRU"]) - published) < 0.04


def test_synthetic_is_the_same_for_the_same_seed():
    assert synthetic(2, 16, 2, 20, seed=3) == synthetic(2, 16, 2, 20, seed=3) != synthetic(2, 16, 2, 20, seed=4)


@pytest.mark.parametrize("slots", [[1], [9]])
def test_slots_out_of_range(slots):
    with pytest.raises(RequestError, match="slots: expected 2 to 8"):
        curves(synthetic(1, 8, 2, 3), slots)


def test_no_pass():
    with pytest.raises(RequestError, match="found none"):
        curves(Trace(1, 8, 2, [], []))


def test_command(tmp_path):
    path = write(tmp_path / "t", synthetic(2, 16, 2, 50))
    args = [
        "cache-sim",
        str(path),
        "--slots",
        "4,8",
        "--plot",
        str(tmp_path / "p.png"),
        "--output",
        str(tmp_path / "j"),
    ]
    printed = CliRunner().invoke(main, args, catch_exceptions=False).output
    assert printed.splitlines()[0].split() == ["slots", "memory", "LRU", "LFU", "Belady"]
    found = json.loads((tmp_path / "j").read_text())
    assert found["slots"] == [4, 8] and found["tokens"] == 50
    assert f"{found['hit_rate']['LRU'][0]:.1%}" in printed
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_no_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DeviceError, match="matplotlib"):
        curves(synthetic(1, 8, 2, 3)).plot(tmp_path / "p.png")
