"""`fedlora audit`: sound code passes, planted lies are caught, and nothing is overwritten.

Audits are seeded. Of sound code each cries wolf with probability at most 0.05 / findings a row by construction; that
these seeds do not is a fact, not a chance.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.adapters.methods import METHODS
from fedlora.cli import main
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunFolderError
from fedlora.experiments import audit as audit_module
from fedlora.experiments import audit_mechanism as audit_mechanism_module
from fedlora.experiments.audit import MOST_CANARIES, MOST_TRIALS, audit
from fedlora.experiments.audit_mechanism import Stage, audit_mechanism, mechanism_work, release_cases, whole_batch
from fedlora.experiments.audit_noise import noise_config, released_noise
from fedlora.experiments.audit_training import audit_training, small_config
from fedlora.federation.cohort import Cohort
from fedlora.federation.site import Site
from fedlora.federation.sites import load_simulated_data
from fedlora.federation.workbench import build_workbench
from fedlora.privacy.audit.finding import ERROR, Finding, judge
from fedlora.privacy.audit.noise import NoiseFinding, judge_noise
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.noise import HostNoise, NoiseSource
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PrivacyPlan, make_plan
from fedlora.privacy.sampling import PoissonSampler
from fedlora.randomness import SecretRoot

BATCH = 8
TRAINED = {
    name: {part for number in (0, 1, 2) for turn in method.turns(number, head=False) for part in turn.parts}
    for name, method in METHODS.items()
}
RECIPE = RunConfig.from_mapping(
    {"privacy": {"epsilon": 3.0, "delta": 1e-4, "accountant": "rdp"}, "training": {"expected_batch_size": BATCH}}
)


def plan_of(config: RunConfig = RECIPE) -> PrivacyPlan:
    return make_plan(config, num_examples=128, num_steps={FINETUNE: 1 * config.federation.local_steps}, client=0)


def audited(plan: PrivacyPlan, config: RunConfig = RECIPE, trials: int = 2500) -> dict[str, Finding]:
    evidence = audit_mechanism(config, plan, trials=trials, secret=SecretRoot.seeded(3), advance=lambda count: None)
    return {finding.evidence.name: finding for finding in judge(evidence)}


def with_lie(**parts: Any) -> PrivacyPlan:
    """The plan with parts of its fine-tuning phase replaced; what it claims stays."""
    plan = plan_of()
    phases = [dataclasses.replace(part, **parts) if part.name == FINETUNE else part for part in plan.phases]
    return dataclasses.replace(plan, phases=tuple(phases))


SIGMA, CLIP = plan_of()[FINETUNE].mechanism.noise_multiplier, plan_of()[FINETUNE].clipping.clip_norm


class LessNoise(GaussianMechanism):
    factor = 0.5

    def privatize(self, total: Tensor, *, sensitivity: float, noise: NoiseSource, slot_sizes: Sequence[int]) -> Tensor:
        return super().privatize(total, sensitivity=self.factor * sensitivity, noise=noise, slot_sizes=slot_sizes)


class NoiseOverRootOfBatch(LessNoise):
    factor = BATCH**-0.5


class NoNoise(GaussianMechanism):
    def privatize(self, total: Tensor, *, sensitivity: float, noise: NoiseSource, slot_sizes: Sequence[int]) -> Tensor:
        return total.float()


class NothingForAnEmptyBatch(GaussianMechanism):
    def privatize(self, total: Tensor, *, sensitivity: float, noise: NoiseSource, slot_sizes: Sequence[int]) -> Tensor:
        if not total.any():
            return total.float()
        return super().privatize(total, sensitivity=sensitivity, noise=noise, slot_sizes=slot_sizes)


class NoiseBeforeClipping(Clipping):
    """To be used with NoNoise."""

    def add_clipped(self, total: Tensor, gradients: Sequence[Tensor], owner: Tensor) -> None:
        super().add_clipped(total, [part + SIGMA * CLIP * torch.randn(part.shape) for part in gradients], owner)


class NoClipping(Clipping):
    def weights(self, norms: Tensor) -> Tensor:
        return torch.ones_like(norms)


class ClipsTheMean(Clipping):
    def add_clipped(self, total: Tensor, gradients: Sequence[Tensor], owner: Tensor) -> None:
        whole = torch.cat(list(gradients), dim=1).double()
        for client in owner.unique():
            mean = whole[owner == client].mean(dim=0)
            total[client] += mean * min(1.0, self.clip_norm / float(mean.norm()))


class DividesByTheRealisedSize(Clipping):
    def add_clipped(self, total: Tensor, gradients: Sequence[Tensor], owner: Tensor) -> None:
        super().add_clipped(total, gradients, owner)
        total.mul_(BATCH / torch.bincount(owner, minlength=len(total)).clamp(min=1)[:, None])


class FixedSizeSampler(PoissonSampler):
    def draw(self, num_examples: int, generator: np.random.Generator) -> np.ndarray:
        count = round(self.sampling_probability * num_examples)
        return np.sort(generator.choice(num_examples, count, replace=False)) if count else np.empty(0, np.int64)


LIES: dict[str, dict[str, Any]] = {
    "half the noise": {"mechanism": LessNoise(SIGMA)},
    "noise over the root of the batch": {"mechanism": NoiseOverRootOfBatch(SIGMA)},
    "no noise": {"mechanism": NoNoise(SIGMA)},
    "noise before clipping": {"clipping": NoiseBeforeClipping("flat", CLIP), "mechanism": NoNoise(SIGMA)},
    "no clipping": {"clipping": NoClipping("flat", CLIP)},
    "clips the mean": {"clipping": ClipsTheMean("flat", CLIP)},
    "divides by the realised size": {"clipping": DividesByTheRealisedSize("flat", CLIP)},
    "skips empty batches": {"mechanism": NothingForAnEmptyBatch(SIGMA)},
    "fixed-size batches": {"sampler": FixedSizeSampler(plan_of()[FINETUNE].sampler.sampling_probability)},
}


# --------------------------------------------------------------------------------------------------- mechanism level


@pytest.fixture(scope="module")
def sound() -> dict[str, Finding]:
    return audited(plan_of())


def test_sound_code_is_not_contradicted(sound: dict[str, Finding]) -> None:
    assert [name for name, finding in sound.items() if finding.contradicts] == []


def test_bounds_on_a_release_come_close_to_the_claim(sound: dict[str, Finding]) -> None:
    whole = [finding for finding in sound.values() if finding.evidence.method == "gaussian"]
    assert len(whole) == 5  # four worst records and the prototype release
    for finding in whole[:4]:
        assert finding.bound > 0.5 * finding.evidence.claimed, finding.evidence.name


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["gaussian", "complex", "complex_half"])
def test_without_any_assumption_half_of_the_claim_is_reached(mechanism: str) -> None:
    gredp = ["privacy.mechanism=gredp", f"privacy.gredp_noise={mechanism}"] if mechanism != "gaussian" else []
    config = RECIPE.with_overrides(*gredp)
    plan = plan_of(config)
    stage = Stage(config=config, plan=plan, trials=100_000, secret=SecretRoot.seeded(3), advance=lambda count: None)
    finding = judge([stage.evidence(release_cases(config, plan[FINETUNE])[0], whole_batch(plan[FINETUNE]))])[0]
    assert 0.5 * finding.evidence.claimed < finding.bound < finding.evidence.claimed


def test_every_phase_is_audited_at_what_the_accountant_charges(sound: dict[str, Finding]) -> None:
    assert {"4 sampled steps, alone", "sampled step, in a crowd", "prototype release"} < sound.keys()
    claims = {name: finding.evidence.claimed for name, finding in sound.items()}
    assert claims["sampled step, in a crowd"] < claims["4 sampled steps, alone"] < RECIPE.privacy.epsilon
    assert claims["prototype release"] < 0.3


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught(lie: str) -> None:
    trials = 12_000 if lie == "fixed-size batches" else 2500
    caught = [name for name, finding in audited(with_lie(**LIES[lie]), trials=trials).items() if finding.contradicts]
    assert caught, lie
    assert "prototype release" not in caught


def test_a_prototype_release_of_too_little_noise_is_caught() -> None:
    config = RECIPE.with_overrides("privacy.prototype_noise_multiplier=2.0")
    plan = plan_of(config)
    lying = dataclasses.replace(plan.phases[0], mechanism=LessNoise(2.0))
    found = audited(dataclasses.replace(plan, phases=(lying, *plan.phases[1:])), config, trials=3000)
    assert [name for name, finding in found.items() if finding.contradicts] == ["prototype release"]


@pytest.mark.parametrize("noise", ["complex", "complex_half"])
@pytest.mark.parametrize("over", ["slot", "flat"])
def test_gredp_with_complex_noise_keeps_its_claim_and_reaches_half_of_it(noise: str, over: str) -> None:
    config = RECIPE.with_overrides(
        "privacy.mechanism=gredp", f"privacy.gredp_noise={noise}", f"privacy.gredp_over={over}"
    )
    found = audited(plan_of(config), config, trials=2000)
    assert [name for name, finding in found.items() if finding.contradicts] == []
    weakest = found["least noised direction"]
    assert weakest.bound > 0.5 * weakest.evidence.claimed


def test_gredp_with_real_noise_claims_nothing_and_hides_nothing() -> None:
    config = RECIPE.with_overrides("privacy.mechanism=gredp", "privacy.gredp_noise=real", "privacy.allow_unsound=true")
    weakest = audited(plan_of(config), config, trials=500)["least noised direction"]
    assert weakest.evidence.claimed == float("inf")
    assert weakest.verdict == "no claim"
    assert weakest.bound > 10


def test_the_noise_source_is_the_one_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def watched(kind: Literal["host", "device"], generator: np.random.Generator, device: torch.device) -> NoiseSource:
        asked.append(kind)
        return HostNoise(generator)

    monkeypatch.setattr(audit_mechanism_module, "make_noise_source", watched)
    monkeypatch.setattr("fedlora.engine.execution.require_accelerator", lambda device: None)
    config = RECIPE.with_overrides(
        "engine.noise=device", "run.device=cpu", "model.dtype=float32", "model.attention=eager"
    )
    audited(plan_of(), config, trials=100)
    assert set(asked) == {"device"}


def test_progress_adds_up() -> None:
    done: list[int] = []
    audit_mechanism(RECIPE, plan_of(), trials=130, secret=SecretRoot.seeded(0), advance=done.append)
    assert sum(done) == mechanism_work(RECIPE, plan_of(), 130)


# ---------------------------------------------------------------------------------------------------- training level


def test_canaries_in_a_run(tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its noise a run keeps its claim; without, the same canaries refute it."""
    config = small_config(
        tiny_config(
            "adapter.rank=8",
            "adapter.target_modules='query,value,key,up,down'",
            "federation.local_steps=8",
            "model.head=trained",
            "privacy.clip_norm=0.001",
            "privacy.delta=1e-6",
            "privacy.epsilon=1",
            "training.expected_batch_size=20",
            "training.learning_rate=0.1",
            hidden_size=64,
            intermediate_size=128,
        ),
        3,
    )
    own, bench = load_simulated_data(config).records.subset(np.arange(10)), build_workbench(config)

    def found() -> Finding:
        secret = SecretRoot.seeded(1)
        return judge([audit_training(config, bench, own, canaries=120, secret=secret, advance=lambda count: None)])[0]

    sound = found()
    assert not sound.contradicts
    assert 0.9 < sound.evidence.claimed <= config.privacy.epsilon
    counts = [len(world[sound.attack]) for world in (sound.evidence.without, sound.evidence.with_record)]
    assert sum(counts) == 120
    assert min(counts) > 30
    monkeypatch.setattr(GaussianMechanism, "privatize", NoNoise.privatize)
    silent = found()
    assert silent.contradicts, silent.bound


@pytest.mark.parametrize("method", METHODS)
def test_canaries_in_a_run_of_every_method(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The auditor knows what each step trains: with noise the claim stands, without the same canaries refute it."""
    config = small_config(
        tiny_config(
            f"adapter.method={method}",
            "adapter.rank=8",
            "adapter.target_modules='query,value,key,up,down'",
            *(["adapter.rate_of_a=0.5"] if "A" in TRAINED[method] else []),
            *(["adapter.ranks='8,4'"] if method in ("flora", "flexlora", "hetlora") else []),
            "federation.local_steps=8",
            "federation.minimum_clients=2",
            "model.head=trained",
            "privacy.clip_norm=0.001",
            "privacy.delta=1e-6",
            "privacy.epsilon=1",
            "training.expected_batch_size=20",
            "training.learning_rate=0.1",
            hidden_size=64,
            intermediate_size=128,
        ),
        3,
    )
    own, bench = load_simulated_data(config).records.subset(np.arange(10)), build_workbench(config)

    def found() -> Finding:
        secret = SecretRoot.seeded(1)
        return judge([audit_training(config, bench, own, canaries=120, secret=secret, advance=lambda count: None)])[0]

    assert not found().contradicts
    monkeypatch.setattr(GaussianMechanism, "privatize", NoNoise.privatize)
    silent = found()
    assert silent.contradicts, silent.bound


def fresh_noise(config: RunConfig) -> NoiseFinding:
    silent = noise_config(config, 2)
    own = load_simulated_data(config).records
    releases = released_noise(silent, build_workbench(config), own, lambda count: None)
    return judge_noise(releases, level="training", name="fresh", error=ERROR / 10)


@dataclasses.dataclass(frozen=True)
class Weaker:
    """A source whose numbers are `factor` times too small."""

    inner: NoiseSource
    factor: float

    def standard_normal(self, count: int, device: torch.device) -> Tensor:
        return self.factor * self.inner.standard_normal(count, device)


def sabotaged(lie: str) -> Callable[[Cohort, Site, int], NoiseSource]:
    """`Cohort._noise` with `lie` in it."""
    sound = Cohort._noise

    def noise(cohort: Cohort, site: Site, index: int) -> NoiseSource:
        match lie:
            case "one stream for all rounds":
                return sound(cohort, site, 0)
            case "one stream for all clients":
                return sound(cohort, cohort.sites[0], index)
            case "one stream":
                return sound(cohort, cohort.sites[0], 0)
        return Weaker(sound(cohort, site, index), float(lie.split()[0]))

    return noise


SHOWS = {
    "0.0 of the noise": "standard deviation",
    "0.5 of the noise": "standard deviation",
    "0.9 of the noise": "standard deviation",
    "one stream for all rounds": "client 0, round 1 (finetune) and client 0, round 2 (finetune) is 1.000",
    "one stream for all clients": "client 0, round 0 (prototype) and client 1, round 0 (prototype) is 1.000",
    "one stream": "correlation",
}


@pytest.mark.parametrize("lie", SHOWS)
def test_a_cohort_that_saves_on_noise_is_caught(
    lie: str, tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cohort, "_noise", sabotaged(lie))
    finding = fresh_noise(tiny_config("model.head=prototype"))
    assert finding.contradicts
    assert SHOWS[lie] in finding.what


def test_a_stream_that_starts_again_in_every_step_is_caught(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(HostNoise):
        def standard_normal(self, count: int, device: torch.device) -> Tensor:
            return HostNoise(copy.deepcopy(self.generator)).standard_normal(count, device)

    monkeypatch.setattr("fedlora.privacy.noise.HostNoise", Stuck)
    finding = fresh_noise(tiny_config())
    assert finding.contradicts
    assert finding.spread == pytest.approx(2**0.5, rel=0.1)  # two steps of one noise


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.head=prototype", "federation.private_evaluation=true"),
        ("privacy.mechanism=gredp", "privacy.gredp_noise=complex_half"),
        ("privacy.low_pass=0.3", "training.optimizer=adam", "training.noise_filter=disk"),
        ("federation.participation=0.4", "federation.local_steps=7", "model.head=trained"),
        *((f"adapter.method={method}", "model.head=trained", "federation.local_steps=3") for method in METHODS),
        ("adapter.method=hetlora", "adapter.ranks='4,2'", "adapter.rate_of_a=3", "federation.wire_dtype=int8"),
        ("adapter.method=la_lora", "privacy.low_pass=0.3"),
        ("federation.aggregator=median", "federation.minimum_clients=3"),
        ("adapter.method=rolora", "privacy.mechanism=gredp"),
    ],
)
def test_noise_of_sound_code_passes(overrides: tuple[str, ...], tiny_config: Callable[..., RunConfig]) -> None:
    finding = fresh_noise(tiny_config(*overrides))
    assert not finding.contradicts, finding.what
    assert finding.spread == pytest.approx(1, rel=0.2)


def test_where_no_noise_is_claimed_none_is_tested(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config("privacy.epsilon=inf")
    own = load_simulated_data(config).records
    assert released_noise(noise_config(config, 2), build_workbench(config), own, lambda count: None) == []


# ----------------------------------------------------------------------------------------------------- whole command


class Silent:
    def start(self, level: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


@pytest.fixture
def command(
    tiny_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """`command("--level", …)` in an empty folder on a tiny recipe: exit code, output, error."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_config("model.head=prototype").to_toml())
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", "audit", str(recipe), *words])
        capfd.readouterr()  # what making the tiny model said
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_an_audit_of_all_levels_leaves_a_folder(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = command("--trials", "300", "--canaries", "40", "--out", "audited")
    assert (code, err) == (0, "")
    assert "canaries in one run" in out
    assert "proves nothing" in out
    report = json.loads(Path("audited/audit.json").read_text())
    assert report["noise_seeded"] is True
    assert report["contradicted"] is False
    assert len(report["findings"]) == 9
    assert "independent, σ·C" in out
    assert report["noise"]["verdict"] == "consistent"
    assert report["noise"]["confidence"] == report["findings"][0]["confidence"] == 1 - ERROR / 10
    assert all(row["epsilon_lower_bound"] <= row["epsilon_claimed"] for row in report["findings"])
    assert Path("audited/audit.png").read_bytes().startswith(b"\x89PNG")
    assert RunConfig.from_toml(Path("audited/config.toml")).privacy.seeded_noise
    code, _, err = command("--trials", "300", "--level", "mechanism", "--out", "audited")
    assert code == 2
    assert "left as it is" in err


def test_a_contradiction_ends_with_code_4_and_one_line(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GaussianMechanism, "privatize", NoNoise.privatize)
    code, out, err = command("--trials", "200", "--level", "mechanism")
    assert code == 4
    assert err.count("\n") == 1
    assert "contradicted" in out
    assert "claims contradicted" in err
    assert len(list(Path("audits").iterdir())) == 1


def test_noise_that_repeats_ends_with_code_4(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cohort, "_noise", sabotaged("one stream for all rounds"))
    code, out, err = command("--canaries", "40", "--level", "training", "--out", "audited")
    assert code == 4
    assert "contradicted" in out
    assert "fresh noise, every round and site: correlation of client 0, round 1" in err
    assert json.loads(Path("audited/audit.json").read_text())["contradicted"] is True


def test_the_audits_randomness_is_the_systems_unless_seeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    roots: list[SecretRoot] = []

    def watched(config: RunConfig, plan: PrivacyPlan, *, secret: SecretRoot, **how: Any) -> list[Any]:
        roots.append(secret)
        return audit_mechanism(config, plan, secret=secret, **how)

    monkeypatch.setattr(audit_module, "audit_mechanism", watched)
    for number, seeded in enumerate(("false", "false", "true")):
        config = RunConfig.from_mapping({}, [f"privacy.seeded_noise={seeded}", "data.generated_records=900"])
        audit(config, level="mechanism", trials=100, canaries=20, out=tmp_path / str(number), progress=Silent())
    assert [root.is_seeded for root in roots] == [False, False, True]
    assert roots[0].root != roots[1].root


def test_mistakes_are_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="left as it is"):
        audit(RECIPE, level="all", trials=100, canaries=20, out=tmp_path / "file", progress=Silent())
    with pytest.raises(ConfigError, match="can show nothing"):
        audit(RECIPE, level="all", trials=5, canaries=20, out=None, progress=Silent())
    for trials, canaries in ((MOST_TRIALS + 1, 20), (100, MOST_CANARIES + 1)):
        with pytest.raises(ConfigError, match="wanted at most 1000000 and 20000"):
            audit(RECIPE, level="all", trials=trials, canaries=canaries, out=None, progress=Silent())


@pytest.mark.parametrize("name", ["file/sub", "new/" + "x" * 300, "nul\0", "/proc/new"])
def test_a_folder_that_cannot_be_made_is_found_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot make the audit folder"):
        audit(RECIPE, level="all", trials=100, canaries=20, out=tmp_path / name, progress=Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_can_be_made_is_not_there_before_there_is_something_to_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: Any) -> None:
        raise ConfigError("no such data")

    monkeypatch.setattr(audit_module, "_collect", failed)
    with pytest.raises(ConfigError, match="no such data"):
        audit(RECIPE, level="all", trials=100, canaries=20, out=tmp_path / "new" / "audit", progress=Silent())
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("option", "most"), [("--trials", MOST_TRIALS), ("--canaries", MOST_CANARIES)])
def test_the_command_has_the_same_limits(command: Callable[..., tuple[int, str, str]], option: str, most: int) -> None:
    code, out, err = command(option, str(most + 1))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"'{option}': {most + 1} is not in the range" in err
