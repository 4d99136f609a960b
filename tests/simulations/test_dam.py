from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from fedlora.adapters.dam import Candidate, ModuleMask, Selection
from simulations import dam

CANDIDATES = tuple(
    Candidate(module=f"layer.{layer}.{kind}", layer=layer, kind=kind, in_features=4, out_features=4)
    for layer in range(2)
    for kind in ("query", "value")
)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dam, "RESULTS", tmp_path)
    dam.read_record.cache_clear()
    return tmp_path


def write(variant: str, epsilon: str, seed: int, value: float, chosen: tuple[bool, ...], scores: list[float]) -> None:
    selection = Selection(
        mask=ModuleMask(CANDIDATES, chosen),
        method="alignment",
        discretise="per_layer_topk",
        ratio=sum(chosen) / 4,
        scores=tuple(scores),
        noise_to_signal=None,
        stability=None,
        diagnostics={},
        note="",
    )
    slots = [{"name": f"{module}/B", "shape": [4, 2], "bytes": 32} for module in selection.mask.modules]
    record = {
        "metric": {"value": value},
        "selection": selection.to_json(),
        "config": {
            "adapter": {"rank": 2, "discretise": "per_layer_topk", "ratio": 0.5},
            "federation": {"clients": 3},
        },
        "privacy": {"vectors_out": [{"phase": "finetune", "bytes": 32 * len(slots), "slots": slots}]},
    }
    dam.record_file("sst2", variant, epsilon, seed).write_text(json.dumps(record))


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


FIRST, OTHER = (True, False, True, False), (False, True, True, False)


def test_tables_are_made_of_records_alone_and_say_how_many_seeds() -> None:
    for seed, gain in enumerate((0.01, 0.02, 0.03)):
        write("random", "1", seed, 0.7, FIRST, [])
        write("alignment", "1", seed, 0.7 + gain, FIRST, [1.0, 0.0, 1.0, 0.0])
    write("alignment", "inf", 0, 0.8, OTHER, [0.0, 1.0, 1.0, 0.0])
    assert cells(dam.utility_table("sst2"), "alignment") == ["0.800 ± 0.000 (1)", "", "", "0.720 ± 0.010"]
    assert cells(dam.difference_table("sst2"), "alignment | random")[:2] == ["random", "3"]
    assert "+0.0200" in dam.difference_table("sst2")
    assert cells(dam.stability_table(), "sst2 | alignment") == ["alignment", "", "", "0.50"]


def test_noise_of_a_release_turns_close_scores_over_and_leaves_distant_ones() -> None:
    write("alignment", "inf", 0, 0.8, FIRST, [1e6, 0.0, 1e6, 0.0])
    assert cells(dam.release_noise_table(), "sst2") == ["1.00"] * 4
    dam.read_record.cache_clear()
    write("alignment", "inf", 0, 0.8, FIRST, [1e-6, 0.0, 1e-6, 0.0])
    assert all(float(cell) == pytest.approx(0.5, abs=0.15) for cell in cells(dam.release_noise_table(), "sst2"))


def test_lora_would_send_the_other_factor_as_well() -> None:
    write(dam.ALL, "6", 0, 0.8, (True,) * 4, [])
    assert cells(dam.uplink_table(), dam.ALL) == ["4", "0.1", "0.3"]


def test_a_copy_of_the_data_is_small_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dam, "MOST_RECORDS", 5)
    source = tmp_path / "glue" / "sst2"
    source.mkdir(parents=True)
    for name, rows in (("train", 9), ("validation", 9)):
        parquet.write_table(pyarrow.table({"label": np.arange(rows)}), source / f"{name}.parquet")
    copies = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        folder = dam.smaller_copy(tmp_path / "glue", tmp_path / name)
        tables = [parquet.read_table(folder / "sst2" / f"{split}.parquet") for split in ("train", "validation")]
        copies.append([table["label"].to_pylist() for table in tables])
    assert copies[0] == copies[1]
    assert [len(labels) for labels in copies[0]] == [5, 9]
