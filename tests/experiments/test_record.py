"""record.json is enough to judge a run: its ε follows from the record alone, by somebody else's code."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import dp_event, pld, rdp

import fedlora
from fedlora.config import RunConfig
from fedlora.experiments.progress import TerminalProgress
from fedlora.experiments.simulate import simulate
from fedlora.provenance import code_digest

MakeRecord = Callable[..., dict[str, Any]]


@pytest.fixture
def make_record(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> MakeRecord:
    """`make_record("section.key=value", …)` does a run and reads what it left."""

    def make(*overrides: str, out: str = "run") -> dict[str, Any]:
        config = tiny_config("privacy.seeded_noise=false", *overrides, f"run.out='{tmp_path / out}'")
        with TerminalProgress() as progress:
            path = simulate(config, progress)
        record: dict[str, Any] = json.loads((path / "record.json").read_text(), parse_constant=pytest.fail)
        return record

    return make


def rederived(client: dict[str, Any]) -> float:
    """ε of a client's phases by dp_accounting alone, from nothing but the record."""
    events = []
    for phase in client["phases"]:
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(phase["effective_noise_multiplier"])
        if phase["sampling_probability"] < 1:
            event = dp_event.PoissonSampledDpEvent(phase["sampling_probability"], event)
        events.append(dp_event.SelfComposedDpEvent(event, phase["num_steps"]))
    accountant = pld.PLDAccountant() if client["accountant"] == "pld" else rdp.RdpAccountant()
    return float(accountant.compose(dp_event.ComposedDpEvent(events)).get_epsilon(client["delta"]))


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("head", ["prototype", "frozen"])
def test_epsilon_follows_from_the_record_alone(
    make_record: MakeRecord, accountant: str, head: str, capfd: pytest.CaptureFixture[str]
) -> None:
    record = make_record(
        f"privacy.accountant={accountant}",
        f"model.head={head}",
        "federation.participation=0.67",
        "data.partition=label_skew",
    )
    shown = [line.split() for line in capfd.readouterr().out.splitlines() if "finetune" in line][-1][3]
    assert len(record["clients"]) == 3
    for client in record["clients"]:
        assert client["epsilon"] == pytest.approx(rederived(client), rel=1e-3)
        assert client["epsilon"] <= record["config"]["privacy"]["epsilon"]
    assert float(shown) == pytest.approx(max(client["epsilon"] for client in record["clients"]), rel=1e-3)


def test_the_promised_keys_are_there(make_record: MakeRecord) -> None:
    record = make_record("privacy.accountant=rdp")
    assert {
        "schema_version",
        "fedlora_version",
        "code_digest",
        "config_digest",
        "model_digest",
        "config",
        "versions",
        "started",
        "wall_seconds",
        "peak_memory_bytes",
        "noise_seeded",
        "metric",
        "bytes_up",
        "bytes_down",
        "clients",
        "privacy",
    } <= record.keys()
    assert record["metric"].keys() == {"name", "value", "split", "of"}
    for client in record["clients"]:
        assert {
            "client",
            "delta",
            "epsilon",
            "accountant",
            "sampling_probability",
            "noise_multiplier",
            "effective_noise_multiplier",
            "num_steps",
            "mechanism",
            "clip_norm",
            "phases",
        } <= client.keys()
        for phase in client["phases"]:
            wanted = {"name", "mechanism", "sampling_probability", "effective_noise_multiplier", "num_steps"}
            assert wanted <= phase.keys()
    assert record["schema_version"] == 1
    assert record["fedlora_version"] == fedlora.__version__
    assert record["code_digest"] == code_digest()
    (weights,) = Path(record["config"]["model"]["name"]).glob("*.safetensors")
    assert record["model_digest"] == sha256(weights.read_bytes()).hexdigest()
    assert record["versions"].keys() >= {"python", "torch", "transformers", "peft", "dp-accounting"}
    assert record["private"] is True
    assert record["wall_seconds"] > 0
    assert record["peak_memory_bytes"] > 100e6


def test_the_configs_digest_ignores_where_the_run_went(make_record: MakeRecord) -> None:
    one, other = (make_record("privacy.accountant=rdp", out=name) for name in ("one", "other"))
    assert one["config"] != other["config"]
    assert one["config_digest"] == other["config_digest"]
    assert RunConfig.from_mapping(one["config"]).digest() == one["config_digest"]


def test_a_seeded_run_is_not_private(make_record: MakeRecord) -> None:
    record = make_record("privacy.accountant=rdp", "privacy.seeded_noise=true")
    assert (record["noise_seeded"], record["private"]) == (True, False)


def test_both_splits_of_mnli_are_reported(make_record: MakeRecord) -> None:
    record = make_record("privacy.accountant=rdp", "data.task=mnli")
    assert record["metric"]["split"] == "validation_matched"
    assert record["metric"]["value"] == record["metrics"]["accuracy"]
    assert "validation_mismatched/accuracy" in record["metrics"]


def test_the_code_digest_follows_the_code(tmp_path: Path) -> None:
    for name, text in (("here", "a = 1\n"), ("there", "a = 1\n"), ("changed", "a = 2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.py").write_text(text)
    assert code_digest(tmp_path / "here") == code_digest(tmp_path / "there")
    assert code_digest(tmp_path / "here") != code_digest(tmp_path / "changed")


def test_the_adapter_is_never_without_its_guarantee(make_record: MakeRecord, tmp_path: Path) -> None:
    record = make_record("privacy.accountant=rdp")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"at δ = {record['clients'][0]['delta']:g} for one record of one site (add/remove), by RDP" in card
    assert f"{record['metric']['value']:.4f}" in card
    assert "ε = ∞" not in card
    make_record("privacy.epsilon=inf", "privacy.accountant=rdp", out="open")
    assert "no guarantee: ε = ∞" in (tmp_path / "open" / "adapter" / "README.md").read_text()
