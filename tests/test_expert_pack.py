"""Records of routed experts: where they lie, and what reading them gives."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_v4flash.errors import CheckpointError
from mlx_v4flash.expert_pack import PAGE, PackedLayer, check_records, lay_out, read_layer, record_bytes, with_records

EXPERTS = 5


def arrays(expert: int) -> dict[str, mx.array]:
    """Components of several types and formats, none a whole page."""
    mx.random.seed(expert)
    words = {f"{m}.weight": mx.random.randint(0, 1 << 30, (24, 300 + i)).astype(mx.uint32) for i, m in
             enumerate(("w1", "w2", "w3"))}  # fmt: skip
    floats = {f"w2.{part}": mx.random.normal((24, 7)).astype(mx.bfloat16) for part in ("biases", "scales")}
    return words | floats | {f"{m}.scales": mx.full((24, 9), expert, mx.uint8) for m in ("w1", "w3")}


def write(path: Path) -> PackedLayer:
    layer = lay_out(arrays(0), 2 * PAGE, {"w2": {"mode": "affine", "group_size": 64, "bits": 3}})
    records = [record_bytes(layer, arrays(e)) for e in range(EXPERTS)]
    path.write_bytes(bytes(2 * PAGE) + b"".join(records))
    return with_records(layer, [zlib.crc32(r) for r in records])


def test_layer_is_read_back_with_biases(tmp_path: Path) -> None:
    layer = write(tmp_path / "p")
    with ThreadPoolExecutor(2) as readers:
        found = read_layer(tmp_path / "p", layer, readers)
    for name in arrays(0):
        want = mx.stack([arrays(e)[name] for e in range(EXPERTS)])
        assert found[name].dtype == want.dtype and mx.array_equal(found[name], want), name


def test_order_and_alignment(tmp_path: Path) -> None:
    layer = write(tmp_path / "p")
    assert [p.name for p in layer.components] == [
        "w1.weight", "w1.scales", "w3.weight", "w3.scales", "w2.weight", "w2.scales", "w2.biases",
    ]  # fmt: skip
    assert not any(p.offset % PAGE for p in layer.components) and layer.stride % PAGE == 0
    assert layer.record(3) == (2 * PAGE + 3 * layer.stride, layer.stride)
    assert layer.end == (tmp_path / "p").stat().st_size


def test_layout_survives_json_and_nonsense_is_refused(tmp_path: Path) -> None:
    layer = write(tmp_path / "p")
    assert PackedLayer.from_json(asdict(layer)) == layer
    for change in ({"stride": layer.stride - PAGE}, {"offset": 0}, {"stride": layer.stride + 1}):
        with pytest.raises(ValueError, match="records of"):
            PackedLayer.from_json(asdict(layer) | change)
    with pytest.raises(ValueError, match="component"):
        PackedLayer.from_json(asdict(layer) | {"components": asdict(layer)["components"][::-1]})


def test_damage_is_found_in_its_record(tmp_path: Path) -> None:
    layer = write(tmp_path / "p")
    assert check_records(tmp_path / "p", layer) == []
    data = np.fromfile(tmp_path / "p", np.uint8)
    data[layer.record(2)[0] + 100] ^= 1
    data.tofile(tmp_path / "p")
    assert check_records(tmp_path / "p", layer) == [2]


def test_truncated_pack_is_named(tmp_path: Path) -> None:
    layer = write(tmp_path / "p")
    with (tmp_path / "p").open("r+b") as file:
        file.truncate(layer.record(4)[0] + 10)
    with ThreadPoolExecutor(2) as readers, pytest.raises(CheckpointError, match="changed or truncated"):
        read_layer(tmp_path / "p", layer, readers)
