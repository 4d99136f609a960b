"""Public texts: never a training record, read from a file as people write one, refused in one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedlora.data.encode import encode
from fedlora.data.glue import Records, load_records
from fedlora.data.public_texts import public_records, refuse_training_records
from fedlora.data.synthetic import generate
from fedlora.data.tasks import TASKS
from fedlora.errors import ConfigError
from fedlora.randomness import PublicSeed
from fedlora.schema import LARGEST_FILE

SEED = PublicSeed.from_int(0)


def rows(records: Records) -> list[tuple[str, ...]]:
    return list(zip(*records.texts, strict=True))


def written(folder: Path, content: str | bytes) -> str:
    file = folder / "texts.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


# --- generated -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_no_first_text_is_in_a_generated_train_split(task: str) -> None:
    """Of the run's own seed, of others, and of the seed that the texts themselves are made from."""
    public = public_records(task, "", SEED)
    assert len(public) == len(set(rows(public))) == 256
    own = PublicSeed(SEED.numpy("public texts").bytes(32))
    for seed in (SEED, own, PublicSeed.from_int(1)):
        (first, *_), _ = generate(task, "train", 6000, seed)
        assert not set(public.texts[0]) & set(first)


@pytest.mark.parametrize("task", TASKS)
def test_columns_are_the_tasks_and_labels_are_absent(task: str) -> None:
    spec, public = TASKS[task], public_records(task, "", SEED)
    assert len(public.texts) == len(spec.text_columns)
    assert public.labels.dtype == (np.float32 if spec.regression else np.int64)
    assert not public.labels.any()


def test_the_seed_decides_and_the_runs_own_validation_texts_are_others() -> None:
    first, again = (rows(public_records("sst2", "", SEED)) for _ in range(2))
    assert first == again
    assert first != rows(public_records("sst2", "", PublicSeed.from_int(1)))
    validation = load_records("sst2", "generated", "validation", generated_records=1536, seed=SEED)
    assert first != rows(validation)


@pytest.mark.parametrize("count", [2, 64, 300, 1000])
def test_as_many_as_asked(count: int) -> None:
    assert len(public_records("qnli", "", SEED, count)) == count


# --- files -----------------------------------------------------------------------------------------------------------


def test_one_text_by_line(tmp_path: Path) -> None:
    file = written(tmp_path, "a film\r\n\n  the plot was dull \n\t\na film\nünï © 電影")
    assert rows(public_records("sst2", file, SEED)) == [("a film",), ("the plot was dull",), ("ünï © 電影",)]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert rows(public_records("sst2", written(tmp_path, b"\xef\xbb\xbfone\ntwo"), SEED)) == [("one",), ("two",)]


def test_pairs_by_tab_and_single_texts_beside_them(tmp_path: Path) -> None:
    file = written(tmp_path, "a film\tthe film\nalone\n left \t right \n")
    public = public_records("stsb", file, SEED)
    assert rows(public) == [("a film", "the film"), ("alone", ""), ("left", "right")]
    assert public.labels.dtype == np.float32


def test_pairs_with_an_empty_second_text_can_be_encoded(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("bert"))
    encoded = encode(public_records("mrpc", written(tmp_path, "film\na\tplot"), SEED), tokenizer, 16)
    assert encoded.lengths.tolist() == [4, 5]  # [CLS] film [SEP] [SEP]


def test_a_long_file_is_read_evenly(tmp_path: Path) -> None:
    file = written(tmp_path, "\n".join(f"text {number}" for number in range(1000)))
    chosen = [int(text.split()[1]) for (text,) in rows(public_records("cola", file, SEED, count=10))]
    assert chosen == list(range(0, 1000, 100))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 different lines of text, wanted at least 2"),
        (b" \n\t\n", "0 different lines of text"),
        (b"same\nsame\nsame \n", "1 different lines of text"),
        (b"fine\nna\xefve", "not UTF-8 text: byte 7"),
        (b"fine\ngood film\t1\n", "line 2 has 2 texts between tabs, but sst2 takes 1; leave labels"),
        (b"a" * (LARGEST_FILE + 1), "more than 1048576 bytes"),
    ],
)
def test_a_useless_file_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        public_records("sst2", written(tmp_path, content), SEED)
    assert "adapter.probe_texts" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "good film" not in str(caught.value), "a text has no place in a message"


def test_three_columns_of_a_pair_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1 has 3 texts between tabs, but rte takes 2"):
        public_records("rte", written(tmp_path, "a\tb\t1\nc\td\t0\n"), SEED)


@pytest.mark.parametrize("name", ["missing.txt", ".", "~nobody-of-this-name/texts.txt", "no\0name"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    path = name if name.startswith("~") else f"{tmp_path}/{name}"
    with pytest.raises(ConfigError, match=r"cannot read adapter\.probe_texts .* give the path of a text file"):
        public_records("sst2", path, SEED)


def test_the_home_folder_may_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, "one\ntwo")
    assert len(public_records("sst2", "~/texts.txt", SEED)) == 2


def test_training_records_are_no_public_texts() -> None:
    training = Records(texts=(["a", "b"], ["x", "y"]), labels=np.zeros(2, np.int64))
    refuse_training_records(Records(texts=(["a", "b"], ["y", "x"]), labels=np.zeros(2, np.int64)), training)
    with pytest.raises(ConfigError, match="some of 2 texts are records of this run's training data"):
        refuse_training_records(Records(texts=(["a", "c"], ["x", "z"]), labels=np.ones(2, np.int64)), training)
