"""Every participant builds the same from the config alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.errors import DataError, ModelError
from fedlora.federation.sites import load_simulated_data, make_site, make_sites
from fedlora.privacy.phases import FINETUNE, PROTOTYPE


def test_two_participants_agree_on_layout_schedule_and_frozen_weights(make_bench: Any) -> None:
    for overrides in (["model.head=trained"], ["engine.backend=opacus", "model.head=trained"]):
        one, other = make_bench("model.head=trained"), make_bench(*overrides)
        assert one.layout.digest == other.layout.digest
        assert one.schedule == other.schedule
        assert torch.equal(one.initial_theta, other.initial_theta)
        batch = {"input_ids": torch.arange(4, 12).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
        theta = torch.randn(one.layout.size, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(one.backend.logits(theta, batch), other.backend.logits(theta, batch), atol=1e-5)


@pytest.mark.parametrize(
    "override", ["adapter.rank=5", "adapter.alpha=3", 'adapter.target_modules="query"', "model.head=trained"]
)
def test_another_configuration_has_another_layout(make_bench: Any, override: str) -> None:
    assert make_bench(override).layout.digest != make_bench().layout.digest


def test_training_starts_at_b_zero_and_at_the_heads_own_values(make_bench: Any) -> None:
    bench = make_bench("model.head=trained")
    theta = bench.initial_theta
    values = {slot.name: bench.layout.view(theta, slot) for slot in bench.layout.slots}
    assert all(not value.any() for name, value in values.items() if name.endswith("/B"))
    assert values["head:classifier/weight"].any()
    assert not make_bench().initial_theta.any()


def test_the_prototype_payload_has_its_own_layout(make_bench: Any) -> None:
    bench = make_bench("model.head=prototype")
    assert bench.payload_layout(FINETUNE) is bench.layout
    assert bench.payload_layout(PROTOTYPE).size == 2 * 16 + 2
    assert bench.payload_layout(PROTOTYPE).digest != bench.layout.digest


def test_an_unknown_target_module_names_what_there_is(make_bench: Any) -> None:
    with pytest.raises(ModelError, match=r"querry.*did you mean 'query'"):
        make_bench('adapter.target_modules="querry"')


@pytest.mark.parametrize("method", ["iid", "dirichlet"])
def test_parts_are_disjoint_and_complete(tiny_config: Any, method: str) -> None:
    data = load_simulated_data(tiny_config(f"data.partition={method}", "federation.clients=4"))
    assert sorted(np.concatenate([*data.parts.values()]).tolist()) == list(range(len(data.records)))


def test_a_site_has_its_part_its_rounds_and_a_plan_for_them(tiny_config: Any, make_federation: Any) -> None:
    federation = make_federation("federation.clients=4", "federation.participation=0.5", "model.head=prototype")
    for client, site in enumerate(federation.sites):
        assert site.client == client
        assert (site.records == federation.data.parts[client]).all()
        assert all(client in entry.clients for entry in site.schedule)
        rounds = sum(entry.phase == FINETUNE for entry in site.schedule)
        assert site.plan[FINETUNE].num_steps == rounds * 2
        assert site.plan[FINETUNE].sampler.sampling_probability == 16 / len(site.records)


def test_secrets_come_from_the_operating_system_unless_noise_is_seeded(tiny_config: Any, make_federation: Any) -> None:
    federation = make_federation()
    arguments = (federation.data, federation.workbench.schedule)
    seeded = [make_sites(federation.config, *arguments)[0].secret for _ in range(2)]
    assert seeded[0] == seeded[1]
    private = [make_site(tiny_config("privacy.seeded_noise=false"), *arguments, 0).secret for _ in range(2)]
    assert private[0] != private[1]
    assert seeded[0] not in private


def test_a_site_that_is_too_small_for_the_batch_or_delta_is_named(tiny_config: Any, make_federation: Any) -> None:
    with pytest.raises(DataError, match="client 0 has 80 records"):
        make_federation("training.expected_batch_size=81")
    with pytest.raises(DataError, match=r"client 0 \(80 records\)"):
        make_federation("privacy.delta=0.0126")
