"""A run under a policy is stopped and goes on: by the same ledger, however the policy is spelled, and only once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.errors import RunFolderError, RunInterrupted
from fedlora.experiments import simulate as module
from fedlora.experiments.run_folder import RunFolder
from fedlora.experiments.simulate import resume, simulate
from fedlora.models import locate_model
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_file import ABANDONED, RESERVED, SPENT
from fedlora.privacy.policy import SitePolicy

POLICY = """
[site]
ledger = "{ledger}"
token_budget = {token_budget}
[limits]
smallest_noise_multiplier = 0.2
[models]
"{model}" = "{digest}"
[data.ward]
task = "sst2"
source = "ward"
max_epsilon = 1000.0
max_delta = 1e-3
"""


@dataclass
class Stopping:
    """Ctrl-C after the round of index `after`."""

    after: int = -1

    def start(self, config: RunConfig, *, folder: Path, metric: str, num_rounds: int, done: int) -> None: ...

    def round(self, report: Any) -> None:
        if report.round == self.after:
            raise KeyboardInterrupt

    def finish(self, record: Any) -> None: ...


@dataclass
class UnderPolicy:
    """A run of four rounds (the first of prototypes), its policy and what may change in it."""

    config: RunConfig
    site: Path

    def policy(self, *, ledger: str = "ledger.sqlite", token_budget: int = 512, path: Path | None = None) -> SitePolicy:
        model = self.config.model.name
        text = POLICY.format(ledger=ledger, token_budget=token_budget, model=model, digest=locate_model(model).digest)
        (self.site / "site.toml").write_text(text)
        return SitePolicy.from_toml(path or self.site / "site.toml")

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.run.out))

    def stop(self, after: int) -> str:
        with pytest.raises(RunInterrupted) as stopped:
            simulate(self.config, Stopping(after), self.policy())
        return str(stopped.value)

    def ended(self) -> list[str]:
        """How the reservations of the ledger ended, oldest first."""
        with closing(Ledger.read(self.site / "ledger.sqlite")) as ledger:
            entries = ledger.entries()
        return [
            "+".join(entry.kind for entry in entries if entry.reservation == charge.id)
            for charge in entries
            if charge.kind == RESERVED
        ]


@pytest.fixture
def under_policy(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> UnderPolicy:
    site = tmp_path / "my site"
    (site / "ward" / "SST-2").mkdir(parents=True)
    rows = [f"the plot was {'very ' * (n % 7)}{('good', 'bad')[n % 2]}\t{n % 2}" for n in range(200)]
    for split in ("train", "dev"):
        (site / "ward" / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    config = tiny_config(
        "model.head=prototype", "federation.clients=1", "privacy.seeded_noise=false", "privacy.accountant=rdp",
        f"run.out='{tmp_path / 'run'}'",
    )  # fmt: skip
    return UnderPolicy(config, site)


def test_ctrl_c_names_the_policy_to_go_on_with(under_policy: UnderPolicy) -> None:
    assert under_policy.stop(after=1).endswith(f"run --policy '{under_policy.site}/site.toml' goes on")
    with pytest.raises(RunInterrupted, match=r"rounds done: 3; .* --policy '.*/my site/site\.toml' goes on$"):
        resume(under_policy.folder.path, Stopping(2), under_policy.policy())


def test_neither_the_spelling_of_a_path_nor_what_the_site_computes_at_once_makes_it_another_run(
    under_policy: UnderPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_policy.stop(after=1)
    monkeypatch.chdir(under_policy.site)
    resume(under_policy.folder.path, Stopping(), under_policy.policy(path=Path("site.toml"), token_budget=256))
    record = json.loads(under_policy.folder.record_file.read_text())
    assert record["config"]["engine"]["token_budget"] == 256
    assert under_policy.ended() == [SPENT] * 4


def test_a_run_goes_on_by_the_ledger_that_it_has_charged(under_policy: UnderPolicy) -> None:
    under_policy.stop(after=1)
    with pytest.raises(RunFolderError, match="its round 0 is not charged in the ledger at hand; with --policy, name"):
        resume(under_policy.folder.path, Stopping(), under_policy.policy(ledger="other.sqlite"))
    with closing(Ledger.open(under_policy.site / "other.sqlite")) as other:
        assert other.entries() == []
    resume(under_policy.folder.path, Stopping(), under_policy.policy())
    assert under_policy.ended() == [SPENT] * 4


def test_an_old_copy_of_a_run_that_went_on_is_refused_and_costs_nothing(under_policy: UnderPolicy) -> None:
    under_policy.stop(after=1)
    copy = shutil.copytree(under_policy.folder.path, under_policy.folder.path.with_name("copy"))
    resume(under_policy.folder.path, Stopping(), under_policy.policy())
    reason = r"charged its rounds up to 3, and it knows rounds up to 1, .* an old copy"
    with pytest.raises(RunFolderError, match=reason):
        resume(copy, Stopping(), under_policy.policy())
    assert under_policy.ended() == [SPENT] * 4


def test_a_last_round_that_a_copy_does_anew_is_one_more_release(under_policy: UnderPolicy) -> None:
    """It looks like a process that died before its checkpoint; that its update left is not taken back."""
    under_policy.stop(after=2)
    copy = shutil.copytree(under_policy.folder.path, under_policy.folder.path.with_name("copy"))
    resume(under_policy.folder.path, Stopping(), under_policy.policy())
    resume(copy, Stopping(), under_policy.policy())
    assert under_policy.ended() == [SPENT, SPENT, SPENT, f"{SPENT}+{ABANDONED}", SPENT]


def test_what_is_charged_before_the_first_round_ends_belongs_to_the_run(
    under_policy: UnderPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Cohort, "_release", died)
        with pytest.raises(RunInterrupted):
            simulate(under_policy.config, Stopping(), under_policy.policy())
    resume(under_policy.folder.path, Stopping(), under_policy.policy())
    assert under_policy.ended() == [ABANDONED] + [SPENT] * 4
