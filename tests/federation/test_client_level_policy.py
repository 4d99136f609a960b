"""A site with a policy that takes part where clients are the unit: its ledger promises its records nothing then."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.errors import BudgetRefused, DataError, PolicyRefused
from fedlora.experiments.simulate import simulate
from fedlora.federation.schedule import make_schedule
from fedlora.federation.sites import load_simulated_data, make_site
from fedlora.models import locate_model
from fedlora.privacy.accounting import Charge
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_file import RESERVED
from fedlora.privacy.policy import SitePolicy

POLICY = """
[limits]
smallest_noise_multiplier = 0.2
[allow]
methods = ["ffa"]
units = {units}
[models]
"{model}" = "{digest}"
[data.ward]
task = "sst2"
source = "generated"
max_epsilon = 1000.0
max_delta = 1e-3
"""


class Silent:
    def start(self, config: RunConfig, **public: Any) -> None: ...

    def round(self, report: Any) -> None: ...

    def finish(self, *public: Any) -> None: ...


def policy_of(folder: Path, config: RunConfig, *units: str) -> SitePolicy:
    path = folder / "site.toml"
    digest = locate_model(config.model.name).digest
    path.write_text(POLICY.format(model=config.model.name, digest=digest, units=json.dumps(units)))
    return SitePolicy.from_toml(path)


@pytest.fixture
def client(tiny_config: Any, tmp_path: Path) -> RunConfig:
    config: RunConfig = tiny_config(
        *("privacy.unit=client", "privacy.seeded_noise=false", f"run.out='{tmp_path / 'run'}'"),
    )
    return config


def test_such_a_run_is_charged_as_a_release_without_noise(client: RunConfig, tmp_path: Path) -> None:
    policy = policy_of(tmp_path, client, "record", "client")
    record = json.loads((simulate(client, Silent(), policy) / "record.json").read_text())
    assert record["privacy"]["enforced"] == "policy"
    assert record["privacy"]["policy"] == {"digest": policy.digest}, "and no cap, as none held it"
    with closing(Ledger.open(policy.ledger)) as ledger:
        charged = [entry for entry in ledger.entries() if entry.kind == RESERVED]
    rounds = client.federation.rounds * client.federation.clients
    assert [(row.unit, row.noise_multiplier, row.sampling_probability) for row in charged] == [
        ("record", 0.0, 1.0)
    ] * rounds


def test_after_it_records_have_no_budget_left(client: RunConfig, tmp_path: Path) -> None:
    policy = policy_of(tmp_path, client, "record", "client")
    simulate(client, Silent(), policy)
    records = client.with_overrides("privacy.unit=record", f"run.out='{tmp_path / 'another'}'")
    with pytest.raises(BudgetRefused):
        simulate(records, Silent(), policy)
    assert not (tmp_path / "another").exists()


def test_a_policy_that_does_not_name_the_unit_refuses_it(client: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match=r"privacy\.unit"):
        simulate(client, Silent(), policy_of(tmp_path, client, "record"))
    assert not (tmp_path / "run").exists()


def test_a_site_says_which_delta_is_wrong_and_no_number_of_its_own(client: RunConfig, tmp_path: Path) -> None:
    config = client.with_overrides("federation.clients=2000")
    policy = policy_of(tmp_path, config, "client")
    schedule, data = make_schedule(config), load_simulated_data(config.with_overrides("federation.clients=2"))
    with pytest.raises(DataError, match="one over the number of clients") as refused:
        make_site(config, data, schedule, 0, policy)
    assert "batch" not in str(refused.value)
    assert "public_size" not in str(refused.value)


def test_a_site_keeps_its_size_and_has_no_cap(client: RunConfig, tmp_path: Path) -> None:
    data, schedule = load_simulated_data(client), make_schedule(client)
    for policy in (None, policy_of(tmp_path, client, "client")):
        site = make_site(client, data, schedule, 0, policy)
        assert (site.public_size, site.cap) == (None, None)
        assert site.data_set.unit == ("client" if policy is None else "record")
        charges = site.planned_charges()
        noise = site.plan["finetune"].charge().noise_multiplier if policy is None else 0.0
        assert charges == [Charge(1.0, noise, 1)] * len(schedule)
