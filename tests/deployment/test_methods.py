"""Methods beside ffa over real processes, TLS and SuperNode authentication: the same numbers as in one process."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedlora.config import RunConfig
from fedlora.experiments.simulate import simulate
from tests.deployment.conftest import Deploy
from tests.deployment.deployed import DeployedSite, Deployment, Submission, failures, rounds_charged, wait_for
from tests.deployment.test_parity import Silent

pytestmark = [pytest.mark.slow, pytest.mark.flower, pytest.mark.xdist_group("flower")]

ROUNDS, RANK, FLOAT = 3, 4, 4
BOTH = ("federation.clients=2", "federation.minimum_clients=2")
MOVING = (*BOTH, "training.optimizer=adam", "training.learning_rate=0.05")
"""Two sites, and steps long enough that a wrong number would show."""
KNOWN = (sys.executable, "-P", str(Path(__file__).with_name("seeded_site.py")), "0")

Adapter = dict[str, Tensor]
"""Of PEFT, by the names in its file."""


@pytest.fixture(scope="module")
def federation(deploy: Deploy, deployed_config: Callable[..., RunConfig]) -> Deployment:
    deployment = deploy(deployed_config(*MOVING), serve=KNOWN)
    for site in deployment.sites:
        allow(site, 'methods = ["lora", "fedex", "fedsa", "fed_sb_svd"]')
    return deployment


@pytest.fixture
def deployment(federation: Deployment) -> Iterator[Deployment]:
    """Everything is up again afterwards, whatever a test has left behind."""
    yield federation
    federation.restore()


def test_a_move_in_eight_bits_is_rounded_as_in_one_process(deployment: Deployment, tmp_path: Path) -> None:
    """With the same stream for both, codes differ only where the last bits of a move decide about a step."""
    asked = ("adapter.method=lora", "federation.wire_dtype=int8")
    run = deployment.submit("int8", "run.seed=0", *asked)
    assert failures(deployment.check(run)) == [{}] * ROUNDS
    path = simulated(deployment, tmp_path, *asked)
    ours, theirs = exported(run.folder.path / "adapter"), exported(path / "adapter")
    off = torch.cat([(ours[name] - tensor).abs().flatten() for name, tensor in theirs.items()])
    assert (off > 1e-5).float().mean() < 0.01, "of independent roundings nearly all would be"
    assert off.max() < 0.01
    assert moved(theirs, "lora_B") > 0.1
    same_facts(run.folder.path, path)
    codes, scales = sum(tensor.numel() for tensor in theirs.values()), FLOAT * len(theirs)
    assert record(run.folder.path)["bytes_up"] == 2 * ROUNDS * (codes + scales)


def test_what_fedex_adds_to_the_base_reaches_every_site(deployment: Deployment, tmp_path: Path) -> None:
    run = deployment.submit("fedex", "run.seed=0", "adapter.method=fedex")
    assert failures(deployment.check(run)) == [{}] * ROUNDS
    path = simulated(deployment, tmp_path, "adapter.method=fedex")
    ours, theirs = products(exported(run.folder.path / "adapter")), products(exported(path / "adapter"))
    for name, product in theirs.items():
        torch.testing.assert_close(ours[name], product, rtol=0, atol=1e-5)
        assert torch.linalg.matrix_rank(product) > RANK, "more than an adapter holds"
    same_facts(run.folder.path, path)
    folded = sum(product.numel() for product in theirs.values())
    adapter = sum(RANK * sum(product.shape) for product in theirs.values())
    instructions = ROUNDS * adapter + (ROUNDS - 1) * folded  # there is nothing to add in the first round
    assert record(run.folder.path)["bytes_down"] == FLOAT * 2 * instructions


def test_the_outer_factors_that_fed_sb_svd_finds_are_every_sites(deployment: Deployment, tmp_path: Path) -> None:
    """B in the first round, A in the second, and R alone, between what the server made of both, in the third."""
    run = deployment.submit("fed-sb-svd", "run.seed=0", "adapter.method=fed_sb_svd")
    assert failures(deployment.check(run)) == [{}] * ROUNDS
    path = simulated(deployment, tmp_path, "adapter.method=fed_sb_svd")
    adapter = exported(path / "adapter")
    ours, theirs = products(exported(run.folder.path / "adapter")), products(adapter)
    for name, product in theirs.items():
        torch.testing.assert_close(ours[name], product, rtol=0, atol=1e-5)
    assert moved(theirs, "") > 1e-2
    same_facts(run.folder.path, path)
    trained = sum(tensor.numel() for tensor in adapter.values()) + RANK * RANK * len(theirs)
    assert record(run.folder.path)["bytes_up"] == FLOAT * 2 * trained


@pytest.mark.parametrize("killed", [False, True], ids=["undisturbed", "killed between two rounds"])
def test_a_site_of_fedsa_keeps_its_b(deployment: Deployment, tmp_path: Path, killed: bool) -> None:
    """It goes on with it after its daemon has died, leaves it to its owner at the end, and to nobody else."""
    steps = f"federation.local_steps={40 if killed else 4}"  # long enough to be caught at
    run = deployment.submit(f"fedsa-{killed}", "run.seed=0", "adapter.method=fedsa", steps)
    before = [own_models(site) for site in deployment.sites]
    if killed:
        kill_between_rounds(deployment, run)
    assert failures(deployment.check(run)) == [{}] * ROUNDS
    path = simulated(deployment, tmp_path, "adapter.method=fedsa", steps)
    ours, theirs = exported(run.folder.path / "adapter"), exported(path / "adapter")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    sent = sum(tensor.numel() for name, tensor in ours.items() if "lora_A" in name)
    assert record(run.folder.path)["bytes_up"] == FLOAT * 2 * ROUNDS * sent
    same_facts(run.folder.path, path)
    own = []
    for site, known in zip(deployment.sites, before, strict=True):
        (folder,) = own_models(site) - known
        own.append(exported(folder))
        simulation = exported(path / f"personal/client-{site.client}")
        assert moved(simulation, "lora_B") > 1e-2
        for name, tensor in simulation.items():
            if "lora_B" in name:
                torch.testing.assert_close(own[-1][name], tensor, rtol=0, atol=1e-5)
                assert all(path.is_relative_to(site.folder) for path in files_with(own[-1][name], deployment.folder))
    for name, tensor in ours.items():
        if "lora_A" in name:
            torch.testing.assert_close((own[0][name] + own[1][name]) / 2, tensor, rtol=0, atol=1e-6)


def test_whole_sites_are_protected_where_their_owners_agree(
    deploy: Deploy, deployed_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """In a federation of its own: where clients are the unit, a site's budget for records is spent for good."""
    deployment = deploy(deployed_config(*MOVING), serve=KNOWN)
    asked = ("privacy.unit=client", "privacy.client_noise=shared", "privacy.client_clip_norm=0.1", "privacy.epsilon=8")
    refused = deployment.submit("refused", *asked)
    code, said = refused.ended()
    assert code not in (0, None)
    assert "nodes answered refused" in said
    for site in deployment.sites:
        assert 'refused by the rule units: privacy.unit = "client", the policy allows record' in site.service.log()
        assert not site.entries()
        allow(site, 'units = ["record", "client"]')
    run = deployment.submit("client", "run.seed=0", *asked)
    assert failures(deployment.check_rounds(run)) == [{}] * ROUNDS
    path = simulated(deployment, tmp_path, *asked)
    ours, theirs = exported(run.folder.path / "adapter"), exported(path / "adapter")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    assert moved(theirs, "lora_B") > 1e-2
    same_facts(run.folder.path, path)
    for site in deployment.sites:
        assert {entry.noise_multiplier for entry in site.entries() if entry.run is not None} == {0.0}


def allow(site: DeployedSite, rule: str) -> None:
    """The owner's policy, with `rule` under [allow]; it is read anew for every request."""
    site.edit("[limits]", f"[allow]\n{rule}\n[limits]")


def simulated(deployment: Deployment, folder: Path, *overrides: str) -> Path:
    """The run folder of the same run in this process, with the secret that `KNOWN` sites have."""
    config = deployment.config.with_overrides(
        *overrides, "privacy.seeded_noise=true", "run.seed=0", f"run.out='{folder / 'simulated'}'"
    )
    return simulate(config, Silent())


def kill_between_rounds(deployment: Deployment, run: Submission) -> None:
    """Kill the first site's daemon in a round that it has answered and the second has not, and start it again."""
    first, second = deployment.sites
    wait_for(lambda: caught_at_work(second), on=run)
    under_way = max(rounds_charged(second, run.run))
    assert under_way < ROUNDS - 1, "caught too late: nothing would come of what is kept"
    wait_for((run.folder.answers_folder / f"{under_way}-{first.client}.safetensors").is_file, on=run)
    first.service.kill()
    first.service.start()
    second.service.resume()


def caught_at_work(site: DeployedSite) -> bool:
    """Whether its daemon is paused in the middle of a round."""
    if not site.at_work():
        return False
    os.kill(site.service.pid, signal.SIGSTOP)  # `Service.pause` looks at all processes first: the round would be over
    if site.at_work():
        return True
    site.service.resume()
    return False


def own_models(site: DeployedSite) -> set[Path]:
    """Adapters that its daemon has left for its owner."""
    return {*(site.folder / "personal").glob("*")}


def exported(folder: Path) -> Adapter:
    """The factors of all modules; the file has a head beside them, which nobody trains here."""
    saved: Adapter = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in saved.items() if "lora_" in name}


def files_with(tensor: Tensor, folder: Path) -> list[Path]:
    """Files below `folder` that hold the first numbers of `tensor`; one at least does."""
    wanted = tensor.numpy().tobytes()[:64]
    found = [path for path in folder.rglob("*") if path.is_file() and wanted in path.read_bytes()]
    assert found
    return found


def moved(adapter: Adapter, factor: str) -> float:
    return max(float(tensor.abs().max()) for name, tensor in adapter.items() if factor in name)


def products(adapter: Adapter) -> Adapter:
    """What each module's B A is, [d_out, d_in]: its factors may be other ones."""
    outer = {name: tensor for name, tensor in adapter.items() if "lora_B" in name}
    return {name: tensor @ adapter[name.replace("lora_B", "lora_A")] for name, tensor in outer.items()}


def record(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "record.json").read_text()))


def same_facts(deployed: Path, simulated: Path) -> None:
    """Noise multipliers, steps and ε of each site, and bytes both ways."""
    ours, theirs = record(deployed), record(simulated)
    for one in (*ours["clients"], *theirs["clients"]):
        del one["noise_seeded"]
    assert [ours[key] for key in ("clients", "bytes_up", "bytes_down")] == [
        theirs[key] for key in ("clients", "bytes_up", "bytes_down")
    ]
