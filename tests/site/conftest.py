"""A data owner's folder: records, policy, tiny model; and a server's side that asks it for rounds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from fedlora.config import RunConfig
from fedlora.data.glue import load_records
from fedlora.federation import wire
from fedlora.federation.messages import ClientUpdate, RoundInstruction
from fedlora.federation.workbench import Workbench, build_workbench
from fedlora.models import locate_model
from fedlora.randomness import PublicSeed
from fedlora.site.protocol import Answer, Request

RECORDS = 120


@dataclass(kw_only=True)
class SiteFolder:
    """One site's folder; what it would be asked comes from `config`."""

    path: Path
    config: RunConfig

    @property
    def settings(self) -> Path:
        return self.path / "site.toml"

    @property
    def socket(self) -> Path:
        return self.path / "site.sock"

    def write_policy(self, *changes: tuple[str, str]) -> None:
        """The policy that just allows `config`, with `changes` made to its text."""
        model = self.config.model.name
        text = f"""
[site]
ledger = "ledger.sqlite"
device = "cpu"
token_budget = 4096
[limits]
smallest_noise_multiplier = 0.3
largest_clip_norm = 1.0
most_steps_per_round = 2
most_rounds = 10
[allow]
phases = ["prototype", "finetune"]
[models]
"{model}" = "{locate_model(model).digest}"
[data.ward]
task = "sst2"
source = "records"
max_epsilon = 6.0
max_delta = 1e-3
"""
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        self.settings.write_text(text)

    def write_records(self, seed: int = 0, count: int = RECORDS) -> None:
        (self.path / "records").mkdir(exist_ok=True)
        for split in ("train", "validation"):
            drawn = PublicSeed.from_int(seed)
            records = load_records("sst2", "generated", split, generated_records=count, seed=drawn)
            table = pyarrow.table({"sentence": records.texts[0], "label": records.labels})
            pyarrow.parquet.write_table(table, self.path / "records" / f"{split}.parquet")


@dataclass(kw_only=True)
class Asking:
    """The server's side of one run: what it would send for each round."""

    config: RunConfig
    workbench: Workbench
    run_id: str

    def enrol(self, client: int = 0) -> Request:
        return Request(ask="enrol", client=client, config=self.config.to_flower())

    def round(self, index: int = 0, *, theta: float = 0.0, client: int = 0, run_id: str | None = None) -> Request:
        """Round `index` of the run, with a global adapter of this value everywhere."""
        entry = self.workbench.schedule[index]
        head = None
        if entry.phase == "finetune" and self.config.model.head == "prototype":
            classifier = self.workbench.classifier
            draw = np.random.default_rng(0).normal(size=(classifier.num_labels, classifier.hidden_size))
            head = (torch.tensor(draw, dtype=torch.float32), torch.zeros(classifier.num_labels))
        instruction = RoundInstruction(
            run_id=run_id or self.run_id,
            round_index=index,
            phase=entry.phase,
            layout_digest=self.workbench.sent_layout(entry).digest,
            theta=torch.full((self.workbench.global_size(entry.phase),), theta),
            head=head,
        )
        return Request(
            ask="round", client=client, config=self.config.to_flower(), instruction=wire.encode_instruction(instruction)
        )

    def under(self, *overrides: str) -> Asking:
        """The same run, asked for with another configuration, whose digest its id has."""
        config = self.config.with_overrides(*overrides)
        return replace(self, config=config, run_id=f"{config.digest()[:16]}-{self.run_id.rpartition('-')[2]}")


def update_in(answer: Answer) -> ClientUpdate:
    assert answer.code == "ok"
    return wire.decode_update(answer.update)


@pytest.fixture
def site_folder(tiny_model: Callable[..., Path]) -> Iterator[SiteFolder]:
    """In /tmp itself: the path of a socket has to be short."""
    path = Path(tempfile.mkdtemp(prefix="fedlora-site-", dir="/tmp"))
    config = RunConfig.from_mapping(
        {
            "model": {"name": str(tiny_model("bert")), "dtype": "float32", "attention": "eager"},
            "data": {"max_length": 16},
            "federation": {"rounds": 3, "local_steps": 2},
            "training": {"expected_batch_size": 16},
            "privacy": {"accountant": "rdp", "delta": 1e-3},
            "run": {"device": "cpu"},
        }
    )
    folder = SiteFolder(path=path, config=config)
    folder.write_policy()
    folder.write_records()
    yield folder
    shutil.rmtree(path)


@pytest.fixture
def asking(site_folder: SiteFolder) -> Asking:
    config = site_folder.config
    return Asking(config=config, workbench=build_workbench(config), run_id=f"{config.digest()[:16]}-{'0' * 16}")
