"""What is refused in a deployment, through real processes: a clear line at the right side, and nothing charged."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

pytest.importorskip("flwr")

from deploy.certificates import make_certificates
from deploy.loopback import CONNECTION
from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.site.connection import DaemonAddress
from fedlora.site.protocol import Request
from tests.deployment.conftest import Deploy
from tests.deployment.deployed import Deployment, wait_for
from tests.deployment.hostile_server import write_app

pytestmark = [pytest.mark.slow, pytest.mark.flower, pytest.mark.xdist_group("flower")]


@pytest.fixture(scope="module")
def deployment(deploy: Deploy, deployed_config: Callable[..., RunConfig]) -> Deployment:
    """One site, with a second key that nobody has registered."""
    return deploy(deployed_config("federation.clients=1"))


@pytest.fixture
def nothing_charged(deployment: Deployment) -> Callable[[], bool]:
    (site,) = deployment.sites
    before = site.entries()
    return lambda: site.entries() == before


def refusals(deployment: Deployment) -> list[dict[str, str]]:
    (site,) = deployment.sites
    lines = [json.loads(line) for line in site.service.log(whole=True).splitlines() if line.startswith("{")]
    return [line for line in lines if line["level"] == "error"]


# Who may not take part ---------------------------------------------------------------------------------------------


def test_supernodes_without_a_registered_key_or_with_another_authority_stay_out(
    deployment: Deployment, nothing_charged: Callable[[], bool]
) -> None:
    """Each is sent away with a line of its own, and the SuperLink's list of nodes is as it was."""
    federation, folder = deployment.federation, deployment.folder
    before = federation.nodes()
    theirs = make_certificates(folder / "theirs", hosts=["127.0.0.1"], sites=1)
    config = f'partition-id=0 site="{deployment.sites[0].socket}"'
    strangers = {
        "Failed to activate": federation.add_supernode(config, key=theirs.site_key(0)),
        "must be registered": federation.add_stranger("--root-certificates", str(federation.certificates.authority)),
        "handshake": federation.add_supernode(config, key=theirs.site_key(0), authority=theirs.authority),
    }
    for said, stranger in strangers.items():
        with pytest.raises(FedloraError, match=said):
            stranger.start(within=60)
        assert stranger.exit_code not in (0, None), said
    plain = federation.add_stranger("--insecure", "--node-config", config)
    plain.launch()
    wait_for(lambda: "retrying" in plain.log())
    plain.stop()
    assert [node["node-id"] for node in federation.nodes()] == [node["node-id"] for node in before]
    assert nothing_charged()


@pytest.mark.parametrize("kind", ["plain HTTP", "another authority"])
def test_who_does_not_know_the_superlink_submits_nothing(
    deployment: Deployment, nothing_charged: Callable[[], bool], kind: str
) -> None:
    federation, home = deployment.federation, deployment.folder / f"stranger-{kind.split()[0]}"
    home.mkdir()
    trust = "insecure = true"
    if kind == "another authority":
        theirs = make_certificates(home / "keys", hosts=["127.0.0.1"], sites=0)
        trust = f'root-certificates = "{theirs.authority}"'
    address = f'address = "127.0.0.1:{federation.port}"'
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n{address}\n{trust}\n'
    )
    submitted = subprocess.run(
        ["flwr", "ls", CONNECTION],
        env=federation.environment | {"FLWR_HOME": str(home)},
        capture_output=True,
        timeout=60,
    )
    assert submitted.returncode != 0
    assert nothing_charged()


# What may not be asked ---------------------------------------------------------------------------------------------

LOOSER = {
    "data.max_epsilon": "privacy.epsilon=50",
    "limits.largest_clip_norm": "privacy.clip_norm=11",
    "sound": "privacy.seeded_noise=true",
}


@pytest.mark.parametrize("rule", LOOSER)
def test_a_run_that_asks_for_less_privacy_than_the_policy_is_refused(
    deployment: Deployment, nothing_charged: Callable[[], bool], rule: str
) -> None:
    """The site's log names the rule; the server learns "refused" and ends as failed; who submitted is told."""
    run = deployment.submit(f"looser-{rule}", LOOSER[rule])
    code, said = run.ended()
    assert code not in (0, None)
    assert "0 of 1 clients joined" in said
    assert "nodes answered refused" in said
    assert rule not in said, "the rule is the site's own business"
    assert f"refused by the rule {rule}:" in refusals(deployment)[-1]["message"]
    assert nothing_charged()


def test_a_hostile_server_gets_each_round_once(deployment: Deployment) -> None:
    """A replay has the same bits; whatever else is asked of a round that is over, or was passed over, is refused."""
    (site,), folder = deployment.sites, deployment.folder
    config = deployment.config.with_overrides("run.seed=77")
    app = write_app(folder / "hostile", config, folder / "notes.json")
    before = len(site.entries())
    run = deployment.federation.submit({}, app=app)
    status = deployment.federation.wait(run, limit=200)
    assert status.completed, status.details
    notes = json.loads((folder / "notes.json").read_text())
    answers = {name: note["answered"] for name, note in notes.items()}
    assert len(answers["first"]) > 1000
    assert answers["replayed"] == answers["first"]
    assert len(answers["passing one over"]) > 1000
    assert {name: code for name, code in answers.items() if len(code) < 1000} == {
        "another for the same round": "over",
        "out of order": "over",
        "an old one replayed": "over",
        "a run of another configuration": "protocol",
        "out of range": "protocol",
        "rubbish": "protocol",
    }
    charged = site.entries()[before:]
    assert [(row.kind, row.round) for row in charged] == [
        ("reserved", 0),
        ("spent", None),
        ("reserved", 2),
        ("spent", None),
    ]
    told = " ".join(line["message"] for line in refusals(deployment))
    for line in ("each round is done once", "began with another configuration", "values beyond ±10", "a header of"):
        assert line in told
    # What a SuperNode has seen it can replay to the socket itself, with no server at all.
    asked = config.with_overrides("run.transport=cohort").to_flower()
    door = DaemonAddress(place=str(site.socket))
    for name, code in (("passing one over", "ok"), ("first", "over"), ("out of order", "over")):
        instruction = bytes.fromhex(notes[name]["asked"])
        replayed = door.ask(Request(ask="round", config=asked, instruction=instruction), limit=60.0)
        assert replayed.code == code
        assert replayed.update.hex() in ("", answers[name])
    assert site.entries()[before:] == charged
