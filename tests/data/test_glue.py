"""Records from folders in every layout, from the hub's stand-in, and the errors people will meet."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fedlora.data.glue import Records, available_validation_splits, load_records
from fedlora.data.tasks import TASKS
from fedlora.errors import DataError
from fedlora.randomness import PublicSeed

SEED = PublicSeed.from_int(0)
REVIEWS: Mapping[str, list[Any]] = {"sentence": ["good", "bad", "fine"], "label": [1, 0, 1], "idx": [0, 1, 2]}


def load(task: str, source: Path | str, split: str = "train") -> Records:
    return load_records(task, str(source), split, generated_records=8, seed=SEED)


def write_parquet(path: Path, table: Mapping[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(dict(table)), path)


def write_text(path: Path, *lines: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding=encoding)


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [".", "sst2"], ids=["the folder above", "the task's own"])
@pytest.mark.parametrize("name", ["train.parquet", "train-00000-of-00001.parquet", "train_subset.parquet"])
def test_parquet(tmp_path: Path, source: str, name: str) -> None:
    write_parquet(tmp_path / "sst2" / name, REVIEWS)
    records = load("sst2", tmp_path / source)
    assert records.texts == (["good", "bad", "fine"],)
    assert records.labels.tolist() == [1, 0, 1]
    assert records.labels.dtype == np.int64
    assert records.columns == {"idx": [0, 1, 2]}


def test_a_folder_of_any_name_holds_one_task(tmp_path: Path) -> None:
    write_parquet(tmp_path / "ward7" / "train.parquet", REVIEWS)
    assert len(load("sst2", tmp_path / "ward7")) == 3


def test_shards_are_put_together(tmp_path: Path) -> None:
    for shard in range(2):
        write_parquet(tmp_path / "sst2" / f"train-0000{shard}-of-00002.parquet", REVIEWS)
    assert len(load("sst2", tmp_path)) == 6


def test_saved_by_datasets(tmp_path: Path) -> None:
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(dict(REVIEWS))})
    saved.save_to_disk(str(tmp_path / "sst2"))
    assert load("sst2", tmp_path).texts == (["good", "bad", "fine"],)


@pytest.mark.parametrize(
    ("task", "folder", "lines", "texts", "labels"),
    [
        ("cola", "CoLA", ["gj04\t1\t\tThey ran.", "gj04\t0\t*\tThey runs."], (["They ran.", "They runs."],), [1, 0]),
        ("sst2", "SST-2", ["sentence\tlabel", 'a "quote\t1', "b\u2028c\t0"], (['a "quote', "b\u2028c"],), [1, 0]),
        (
            "mrpc",
            "MRPC",
            ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\t"A\tB', "0\t7\t8\tC\tD"],
            (['"A', "C"], ["B", "D"]),
            [1, 0],
        ),
        (
            "mnli",
            "MNLI",
            ["index\tgenre\tsentence1\tsentence2\tgold_label", "0\tfiction\tP\tH\tneutral", "1\tx\tQ\tI\tentailment"],
            (["P", "Q"], ["H", "I"]),
            [1, 0],
        ),
        (
            "qqp",
            "QQP",
            [
                "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
                "1\t2\t3\tA?\tB?\t0",
                "cut short\t3",
                "1\t2\t3\tC\tD\t1",
            ],
            (["A?", "C"], ["B?", "D"]),
            [0, 1],
        ),
        ("rte", "RTE", ["index\tsentence1\tsentence2\tlabel", "0\tA\tB\tnot_entailment"], (["A"], ["B"]), [1]),
        ("stsb", "STS-B", ["index\tsentence1\tsentence2\tscore", "0\tA\tB\t2.500"], (["A"], ["B"]), [2.5]),
    ],
)
def test_original_tsv(tmp_path: Path, task: str, folder: str, lines: list[str], texts: Any, labels: Any) -> None:
    write_text(tmp_path / folder / "train.tsv", *lines, encoding="utf-8-sig" if task == "mrpc" else "utf-8")
    records = load(task, tmp_path)
    assert records.texts == texts
    assert records.labels.tolist() == labels
    assert records.labels.dtype == (np.float32 if task == "stsb" else np.int64)


def test_dev_is_validation_and_further_columns_stay(tmp_path: Path) -> None:
    lines = ("genre\tsentence1\tsentence2\tgold_label", "fiction\tP\tH\tneutral")
    write_text(tmp_path / "MNLI" / "dev_matched.tsv", *lines)
    records = load("mnli", tmp_path, "validation_matched")
    assert records.columns == {"genre": ["fiction"]}


def test_a_subset_is_announced_and_the_altered_copy_never_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet(tmp_path / "sst2" / "train_subset_noperiods.parquet", REVIEWS)
    write_parquet(tmp_path / "sst2" / "validation.parquet", REVIEWS)
    with pytest.raises(DataError, match="no split 'train'"):
        load("sst2", tmp_path)
    write_parquet(tmp_path / "sst2" / "train_subset.parquet", REVIEWS)
    with caplog.at_level(logging.INFO):
        load("sst2", tmp_path)
    assert "a subset of the split train" in caplog.text


def test_a_missing_validation_split_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = {"premise": ["P"], "hypothesis": ["H"], "label": [2]}
    write_parquet(tmp_path / "mnli" / "validation_matched.parquet", table)
    with caplog.at_level(logging.INFO):
        assert available_validation_splits("mnli", str(tmp_path)) == ("validation_matched",)
    assert "validation_mismatched" in caplog.text
    with pytest.raises(DataError, match="it has validation_matched"):
        load("mnli", tmp_path, "validation_mismatched")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["secret"], "label": [0]}, "no column sentence"),
        ({"sentence": ["secret", "secret"], "label": [-1, 0]}, r"some labels are outside 0 to 1; .*hidden"),
        ({"sentence": ["secret"], "label": [2]}, "outside 0 to 1"),
        ({"sentence": ["secret"], "label": [0.5]}, "outside 0 to 1"),
        ({"sentence": ["secret"], "label": ["secret"]}, "wanted negative, positive"),
        ({"sentence": ["secret"], "label": pyarrow.array([None], pyarrow.int64())}, "no label"),
        ({"sentence": ["secret", None], "label": [0, 1]}, "some values of column sentence are not text"),
        ({"sentence": pyarrow.array([], pyarrow.string()), "label": []}, "holds no record"),
    ],
)
def test_bad_tables_are_refused_without_showing_them(tmp_path: Path, table: Any, message: str) -> None:
    write_parquet(tmp_path / "sst2" / "train.parquet", table)
    with pytest.raises(DataError, match=message) as caught:
        load("sst2", tmp_path)
    assert "secret" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    write_text(tmp_path / "sst2" / "train.parquet", "not parquet")
    with pytest.raises(DataError, match="as parquet"):
        load("sst2", tmp_path)
    write_text(tmp_path / "SST-2x" / "train.tsv", "sentence\tlabel", "caf\xe9\t1", encoding="latin-1")
    with pytest.raises(DataError, match="as UTF-8"):
        load("sst2", tmp_path / "SST-2x")
    write_text(tmp_path / "rte" / "train" / "state.json", "{}")
    with pytest.raises(DataError, match="save it again"):
        load("rte", tmp_path)
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.tsv").write_text("")
    with pytest.raises(DataError, match="holds no record"):
        load("cola", tmp_path)


@pytest.mark.parametrize(("source", "hint"), [("generatd", "did you mean generated"), ("no/such", "existing folder")])
def test_no_such_source(source: str, hint: str) -> None:
    with pytest.raises(DataError, match=hint):
        load("sst2", source)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="wanted a sub-folder sst2"):
        load("sst2", tmp_path)
    pairs = {"sentence1": ["A"], "sentence2": ["B"], "label": [0]}
    write_parquet(tmp_path / "rte" / "train.parquet", pairs)
    with pytest.raises(DataError, match="the folder of rte, wanted mrpc"):
        load("mrpc", tmp_path / "rte")
    with pytest.raises(DataError, match=r"no validation split of rte .* it has train"):
        available_validation_splits("rte", str(tmp_path))


def test_columns_of_different_lengths() -> None:
    with pytest.raises(DataError, match="wanted one length"):
        Records(texts=(["a", "b"],), labels=np.zeros(3, np.int64))


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stand_in(path: str, name: str, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_dict(dict(REVIEWS))

    monkeypatch.setattr("fedlora.data.readers._hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    assert load("sst2", "hub", "validation").labels.tolist() == [1, 0, 1]
    assert asked == [("nyu-mll/glue", "sst2", "validation")]
    assert available_validation_splits("mnli", "hub") == TASKS["mnli"].validation_splits


def test_an_unreachable_hub_is_one_error_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before, start = datasets.config.HF_HUB_OFFLINE, time.perf_counter()
    with pytest.raises(DataError, match=r"'train' of sst2 in nyu-mll/glue from the hub \(which does not answer\)"):
        load("sst2", "hub")
    assert time.perf_counter() - start < 5
    assert before == datasets.config.HF_HUB_OFFLINE


# --- real files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_glue() -> Path:
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "glue"
    folder = Path(os.environ.get("FEDLORA_GLUE", beside))
    if not folder.is_dir():
        pytest.skip("no GLUE files: set FEDLORA_GLUE to a folder with one sub-folder per task")
    return folder


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte"])
def test_real_files(real_glue: Path, task: str) -> None:
    for split in available_validation_splits(task, str(real_glue)):
        records = load(task, real_glue, split)
        assert len(records) > 250
        assert set(records.labels.tolist()) == set(range(TASKS[task].num_labels))
    assert len(load(task, real_glue)) > 2000
