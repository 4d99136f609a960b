"""`train`: K fused clients are K separate ones, and only what is documented decides the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlora.adapters.methods import layout as layouts
from fedlora.config import TrainingConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import record_losses
from fedlora.engine.batching import Shapes
from fedlora.engine.training import TrainedRow, TrainingJob, train
from fedlora.errors import PrivacyError
from fedlora.federation.workbench import Workbench
from fedlora.models import load_classifier
from fedlora.privacy.noise import HostNoise
from fedlora.privacy.plan import PhasePlan
from fedlora.privacy.sampling import PoissonSampler
from fedlora.randomness import PublicSeed, SecretRoot

LENGTHS = [5, 12, 3, 9, 12, 4, 7, 6, 3, 11, 8, 5, 4, 10, 6, 5, 7, 3, 9, 4]
PARTS = [np.arange(0, 9), np.arange(9, 11), np.arange(11, 20)]
SGD = TrainingConfig(optimizer="sgd", expected_batch_size=4)


def make_jobs(phase: PhasePlan, parts: Sequence[np.ndarray], secret: int = 0) -> list[TrainingJob]:
    """Jobs with the streams that client 0, 1, … always gets, whoever trains beside it."""
    root = SecretRoot.seeded(secret)
    return [
        TrainingJob(
            records=part, phase=phase, sampling=root.numpy("s", client), noise=HostNoise(root.numpy("n", client))
        )
        for client, part in enumerate(parts)
    ]


def run(
    bench: Workbench, dataset: EncodedDataset, jobs: Sequence[TrainingJob], theta: Tensor, **how: Any
) -> list[TrainedRow]:
    settings: dict[str, Any] = {"num_steps": 3, "learning_rate": 0.7, "training": SGD, "shapes": Shapes(60)}
    return train(bench.backend, dataset, jobs, theta, **{**settings, **how})


def start(bench: Workbench) -> Tensor:
    return 0.2 * torch.randn(bench.layout.size, generator=torch.Generator().manual_seed(2))


def assert_close(got: Tensor, wanted: Tensor, start: Tensor, relative: float = 1e-5) -> None:
    """Relative to how far training moved, not to where it began."""
    moved = (wanted - start).norm()
    assert moved > 1e-3
    assert (got - wanted).norm() <= relative * moved + 1e-7 * start.norm()


class NobodySampler(PoissonSampler):
    def draw(self, num_examples: int, generator: np.random.Generator) -> np.ndarray:
        super().draw(num_examples, generator)
        return np.empty(0, np.int64)


# ---------------------------------------------------------------------------------------------------- fused clients


@pytest.mark.parametrize("noise", [0.0, 1.3])
@pytest.mark.parametrize("kind", ["flat", "automatic"])
def test_fused_clients_equal_separate_ones(
    make_bench: Any, random_records: Any, make_phase: Any, noise: float, kind: str
) -> None:
    bench, dataset = make_bench("model.head=trained"), random_records(LENGTHS)
    phase, theta = make_phase(0.4, noise, 0.5, kind), start(bench)
    fused = run(bench, dataset, make_jobs(phase, PARTS), theta)
    for client, row in enumerate(fused):
        alone = run(bench, dataset, [make_jobs(phase, PARTS)[client]], theta)[0]
        assert_close(row.theta, alone.theta, theta)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_fused_clients_keep_their_own_optimizer_state(
    make_bench: Any, random_records: Any, make_phase: Any, optimizer: str
) -> None:
    bench, dataset = make_bench(), random_records(LENGTHS)
    training = TrainingConfig(optimizer=optimizer, expected_batch_size=4, weight_decay=0.1)  # type: ignore[arg-type]
    phase, theta = make_phase(0.4, 1.3, 0.5), start(bench)
    fused = run(bench, dataset, make_jobs(phase, PARTS), theta, training=training, learning_rate=0.01)
    for client, row in enumerate(fused):
        job = make_jobs(phase, PARTS)[client]
        alone = run(bench, dataset, [job], theta, training=training, learning_rate=0.01)[0]
        assert torch.allclose(row.theta, alone.theta, atol=2e-5)
        assert row.optimizer_state.keys() == alone.optimizer_state.keys() != set()


def test_one_client_with_an_empty_batch_does_not_disturb_the_others(
    make_bench: Any, random_records: Any, make_phase: Any
) -> None:
    bench, dataset = make_bench(), random_records(LENGTHS)
    phase, theta = make_phase(0.5, 0.8), start(bench)
    jobs = make_jobs(phase, PARTS)
    jobs[1].phase = dataclasses.replace(phase, sampler=NobodySampler(0.5))
    fused = run(bench, dataset, jobs, theta, num_steps=1)
    for client in (0, 2):
        alone = run(bench, dataset, [make_jobs(phase, PARTS)[client]], theta, num_steps=1)[0]
        assert_close(fused[client].theta, alone.theta, theta)
    noise = torch.from_numpy(SecretRoot.seeded(0).numpy("n", 1).standard_normal(bench.layout.size)).float()
    assert torch.allclose(fused[1].theta, theta - 0.7 * 0.8 * noise / 4, atol=1e-6)


def test_one_client_is_the_others_equal_only_in_its_own_streams(
    make_bench: Any, random_records: Any, make_phase: Any
) -> None:
    bench, dataset = make_bench(), random_records(LENGTHS)
    same = [PARTS[0], PARTS[0]]
    first, second = run(bench, dataset, make_jobs(make_phase(0.5, 1.0), same), start(bench))
    assert not torch.allclose(first.theta, second.theta)
    first, second = run(bench, dataset, make_jobs(make_phase(1.0, 0.0), same), start(bench))
    assert torch.allclose(first.theta, second.theta, atol=1e-6)


def test_other_clients_data_leave_a_row_bit_identical(make_bench: Any, random_records: Any, make_phase: Any) -> None:
    bench, dataset = make_bench("model.head=trained"), random_records([8] * 20)
    changed = dataclasses.replace(dataset, ids=dataset.ids.copy(), labels=dataset.labels.copy())
    for record in PARTS[1]:
        changed.ids[dataset.starts[record] : dataset.starts[record] + 8] = 17
        changed.labels[record] = 1 - changed.labels[record]
    phase, theta = make_phase(0.6, 1.0), start(bench)
    before = run(bench, dataset, make_jobs(phase, PARTS), theta)
    after = run(bench, changed, make_jobs(phase, PARTS), theta)
    for client in (0, 2):
        assert torch.equal(before[client].theta, after[client].theta)
    assert not torch.equal(before[1].theta, after[1].theta)


def test_a_client_whose_vector_is_broken_harms_nobody_else(
    make_bench: Any, random_records: Any, make_phase: Any
) -> None:
    """Adam's state of client 1 is NaN: its row is lost, the others' are not."""
    bench, dataset = make_bench(), random_records([8] * 20)
    training = TrainingConfig(optimizer="momentum", expected_batch_size=4)
    phase, theta = make_phase(1.0, 0.5), start(bench)
    clean = run(bench, dataset, make_jobs(phase, PARTS), theta, training=training)
    jobs = make_jobs(phase, PARTS)
    jobs[1].optimizer_state = {"all/momentum_buffer": torch.full_like(theta, torch.nan)}
    broken = run(bench, dataset, jobs, theta, training=training)
    assert torch.isnan(broken[1].theta).all()
    for client in (0, 2):
        assert torch.equal(clean[client].theta, broken[client].theta)


def test_jobs_that_ask_for_different_clipping_are_refused(table_backend: Any, make_phase: Any) -> None:
    """Each job's noise is scaled to its own clip norm, so clipping at a neighbour's larger one would break its ε."""
    backend = table_backend(torch.ones(6, 3))
    jobs = make_jobs(make_phase(1.0, 0.0, 100.0), [np.arange(3), np.arange(3, 6)])
    jobs[1].phase = make_phase(1.0, 0.0, 0.1)
    with pytest.raises(PrivacyError, match="project or clip differently"):
        train(
            backend,
            backend.dataset,
            jobs,
            torch.zeros(3),
            num_steps=1,
            learning_rate=1.0,
            training=SGD,
            shapes=Shapes(9),
        )
    assert backend.asked == []


# ------------------------------------------------------------------------------------- what must not change anything


@pytest.mark.parametrize("token_budget", [1, 13, 37, 1_000_000])
def test_the_split_into_micro_batches_changes_nothing(
    make_bench: Any, random_records: Any, make_phase: Any, token_budget: int
) -> None:
    bench, dataset = make_bench("model.head=trained"), random_records(LENGTHS)
    phase, theta = make_phase(0.7, 0.4, 0.5), start(bench)
    jobs, others = make_jobs(phase, PARTS), make_jobs(phase, PARTS)
    wanted = run(bench, dataset, jobs, theta, shapes=Shapes(60))
    got = run(bench, dataset, others, theta, shapes=Shapes(token_budget))
    for row, other in zip(got, wanted, strict=True):
        assert_close(row.theta, other.theta, theta)
    for job, other in zip(jobs, others, strict=True):
        streams = [source.noise.generator for source in (job, other)]  # type: ignore[attr-defined]
        assert streams[0].random() == streams[1].random(), "noise is drawn once per logical step"
        assert job.sampling.random() == other.sampling.random()


def test_the_order_of_records_changes_nothing(make_bench: Any, random_records: Any, make_phase: Any) -> None:
    bench, dataset = make_bench(), random_records(LENGTHS)
    phase, theta = make_phase(1.0, 0.0, 0.5), start(bench)
    shuffled = [part[::-1].copy() for part in PARTS]
    for row, other in zip(
        run(bench, dataset, make_jobs(phase, PARTS), theta),
        run(bench, dataset, make_jobs(phase, shuffled), theta),
        strict=True,
    ):
        assert_close(row.theta, other.theta, theta)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_opacus_back_end_trains_to_the_same_rows(
    make_bench: Any, random_records: Any, make_phase: Any, optimizer: str
) -> None:
    pytest.importorskip("opacus")
    dataset = random_records(LENGTHS)
    benches = [make_bench("model.head=trained", f"engine.backend={name}") for name in ("expanded", "opacus")]
    training = TrainingConfig(optimizer=optimizer, expected_batch_size=4)  # type: ignore[arg-type]
    phase, theta = make_phase(0.6, 0.9, 0.5), start(benches[0])
    rate = 0.7 if optimizer == "sgd" else 0.01
    rows, others = (
        run(bench, dataset, make_jobs(phase, PARTS), theta, training=training, learning_rate=rate) for bench in benches
    )
    for row, other in zip(rows, others, strict=True):
        assert_close(row.theta, other.theta, theta, relative=1e-4 if "adam" in optimizer else 1e-5)


def test_inputs_are_left_as_they_were(make_bench: Any, random_records: Any, make_phase: Any) -> None:
    bench, dataset = make_bench(), random_records(LENGTHS)
    training = TrainingConfig(optimizer="adam", expected_batch_size=4)
    theta = start(bench)
    jobs = make_jobs(make_phase(0.7, 1.0), PARTS)
    first = run(bench, dataset, jobs, theta, training=training)
    for job, row in zip(jobs, first, strict=True):
        job.optimizer_state = row.optimizer_state
    kept = [{key: value.clone() for key, value in row.optimizer_state.items()} for row in first]
    thetas = [row.theta.clone() for row in first]
    run(bench, dataset, jobs, theta, training=training)
    assert torch.equal(theta, start(bench))
    for row, state, vector in zip(first, kept, thetas, strict=True):
        assert torch.equal(row.theta, vector)
        assert all(torch.equal(row.optimizer_state[key], value) for key, value in state.items())


# -------------------------------------------------------------------------------------- what a step is without privacy


def plain_sgd_step(
    bench: Workbench, dataset: EncodedDataset, records: np.ndarray, theta: Tensor, rate: float, divisor: float
) -> Tensor:
    """Summed loss over one padded batch, autograd on the merged weights, divided by `divisor`."""
    classifier = load_classifier(bench.config.model, num_labels=2, seed=PublicSeed.from_int(0), attention="eager")
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    linears = classifier.target_modules(bench.config.adapter.targets)
    leaf, weights = theta.clone().requires_grad_(), {}
    for slot in bench.layout.slots:
        path = slot.name.removesuffix("/B")
        factor = layouts.frozen_factor(PublicSeed.from_int(0), path, 4, linears[path].in_features)
        update = bench.layout.scale * bench.layout.view(leaf, slot) @ factor
        weights[names[id(linears[path].weight)]] = linears[path].weight + update
    batch, labels = dataset.batch(records)
    loss = record_losses(functional_call(classifier, weights, (batch,)), labels).sum()
    return theta - rate * torch.autograd.grad(loss, leaf)[0] / divisor


def test_without_clipping_and_noise_a_step_is_plain_sgd_over_the_expected_batch_size(
    make_bench: Any, random_records: Any, make_phase: Any
) -> None:
    bench, dataset = make_bench(), random_records(LENGTHS)
    theta, phase, told_apart = start(bench), make_phase(0.5, 0.0, 1e6), 0
    for secret in (0, 3, 4, 5):
        own = PARTS[0][PoissonSampler(0.5).draw(9, SecretRoot.seeded(secret).numpy("s", 0))]
        got = run(bench, dataset, make_jobs(phase, PARTS[:1], secret), theta, num_steps=1)[0].theta
        wanted = plain_sgd_step(bench, dataset, own, theta, 0.7, SGD.expected_batch_size)
        assert_close(got, wanted, theta)
        realised = plain_sgd_step(bench, dataset, own, theta, 0.7, len(own))
        told_apart += bool((got - realised).norm() > 0.1 * (got - theta).norm())
    assert told_apart >= 2, "no batch was of another size than expected"


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_optimizers_are_torchs_own(table_backend: Any, make_phase: Any, optimizer: str) -> None:
    gradient = torch.tensor([[0.5, -0.25, 0.125, 1.0]])
    backend = table_backend(gradient)
    training = TrainingConfig(optimizer=optimizer, expected_batch_size=2, weight_decay=0.1, momentum=0.8)  # type: ignore[arg-type]
    parameter = nn.Parameter(torch.ones(4))
    makers: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    }
    reference = makers[optimizer]([parameter])
    for _ in range(5):
        parameter.grad = gradient[0] / 2
        reference.step()
    job = make_jobs(make_phase(1.0, 0.0, 10.0), [np.array([0])])[0]
    theta = torch.ones(4)
    for steps in (2, 3):  # in two calls with the state handed on
        row = train(
            backend,
            backend.dataset,
            [job],
            theta,
            num_steps=steps,
            learning_rate=0.1,
            training=training,
            shapes=Shapes(9),
        )[0]
        theta, job.optimizer_state = row.theta, row.optimizer_state
    assert torch.allclose(theta, parameter.detach(), atol=1e-6)


def test_without_kept_state_adam_starts_afresh(table_backend: Any, make_phase: Any) -> None:
    backend = table_backend(torch.tensor([[0.5, -0.25]]))
    training = TrainingConfig(optimizer="adam", expected_batch_size=1)
    settings: dict[str, Any] = {"num_steps": 1, "learning_rate": 0.1, "training": training, "shapes": Shapes(9)}
    for _ in range(2):
        job = make_jobs(make_phase(1.0, 0.0, 10.0), [np.array([0])])[0]
        moved = train(backend, backend.dataset, [job], torch.zeros(2), **settings)[0].theta
        assert torch.allclose(moved, torch.tensor([-0.1, 0.1]), atol=1e-5)


# --------------------------------------------------------------------------------------------- clipping inside a step


def test_a_step_is_at_most_the_clip_norm_of_every_record(table_backend: Any, make_phase: Any) -> None:
    table = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-4, 4).unsqueeze(1)
    for kind in ("flat", "automatic"):
        backend = table_backend(table, (10, 39, 1))
        for record in range(8):
            job = make_jobs(make_phase(1.0, 0.0, 0.3, kind), [np.array([record])])[0]
            moved = train(
                backend,
                backend.dataset,
                [job],
                torch.zeros(50),
                num_steps=1,
                learning_rate=1.0,
                training=TrainingConfig(expected_batch_size=1),
                shapes=Shapes(9),
            )[0].theta
            assert moved.double().norm() <= 0.3 * (1 + 1e-6)


def test_one_record_more_or_less_moves_a_step_by_at_most_the_clip_norm(
    make_bench: Any, random_records: Any, make_phase: Any
) -> None:
    bench, dataset = make_bench("model.head=trained"), random_records(LENGTHS)
    theta, phase = 3 * start(bench), make_phase(1.0, 0.0, 0.2)
    whole = run(bench, dataset, make_jobs(phase, [np.arange(20)]), theta, num_steps=1, learning_rate=4.0)[0].theta
    for left_out in range(0, 20, 3):
        rest = np.delete(np.arange(20), left_out)
        less = run(bench, dataset, make_jobs(phase, [rest]), theta, num_steps=1, learning_rate=4.0)[0].theta
        assert (whole - less).norm() <= 0.2 * (1 + 1e-4)
        assert (whole - less).norm() > 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e6, 3e38])
@pytest.mark.parametrize("kind", ["flat", "automatic"])
def test_a_poisoned_record_does_not_disturb_the_others(
    table_backend: Any, make_phase: Any, poison: float, kind: str
) -> None:
    table = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"num_steps": 1, "learning_rate": 1.0, "training": SGD, "shapes": Shapes(100)}
    parts = [np.arange(3), np.arange(3, 6)]
    phase = make_phase(1.0, 0.0, 1.0, kind)
    poisoned = table.clone()
    poisoned[1, ::7] = poison
    rows = {}
    for name, gradients, own in (
        ("clean", table, parts),
        ("poisoned", poisoned, parts),
        ("without", table, [np.array([0, 2]), parts[1]]),
    ):
        backend = table_backend(gradients, (15, 25))
        rows[name] = train(backend, backend.dataset, make_jobs(phase, own), torch.zeros(40), **settings)
    assert torch.equal(rows["poisoned"][1].theta, rows["clean"][1].theta)
    difference = rows["poisoned"][0].theta - rows["without"][0].theta
    assert torch.isfinite(difference).all()
    if abs(poison) < 1e30:
        assert 4 * difference.norm() <= 1 + 1e-5
    else:
        assert torch.allclose(difference, torch.zeros(40), atol=1e-7), "contributes exactly nothing"


def test_a_record_that_is_not_a_number_in_a_real_model_contributes_nothing(
    make_bench: Any, random_records: Any, make_phase: Any
) -> None:
    bench, dataset = make_bench(), random_records([6] * 8)
    own = np.arange(8)
    dataset.ids[dataset.starts[3] : dataset.starts[3] + 6] = 5
    dataset.ids[dataset.ids == 18] = 17
    dataset.ids[dataset.starts[3]] = 18  # only record 3 has the word whose embedding is broken
    bench.classifier.backbone.embeddings.word_embeddings.weight[18] = torch.nan
    theta, phase = start(bench), make_phase(1.0, 0.0)
    got = run(bench, dataset, make_jobs(phase, [own]), theta, num_steps=2)[0].theta
    wanted = run(bench, dataset, make_jobs(phase, [np.delete(own, 3)]), theta, num_steps=2)[0].theta
    assert_close(got, wanted, theta)


# -------------------------------------------------------------------------------------------------------- empty batch


def test_an_empty_batch_skips_the_forward_and_still_adds_noise(table_backend: Any, make_phase: Any) -> None:
    backend = table_backend(torch.ones(5, 64))
    phase = dataclasses.replace(make_phase(0.5, 2.0, 3.0), sampler=NobodySampler(0.5))
    jobs = make_jobs(phase, [np.arange(3), np.arange(3, 5)])
    rows = train(
        backend, backend.dataset, jobs, torch.zeros(64), num_steps=4, learning_rate=0.5, training=SGD, shapes=Shapes(9)
    )
    assert backend.asked == []
    for client, row in enumerate(rows):
        stream = SecretRoot.seeded(0).numpy("n", client)
        noise = sum(torch.from_numpy(stream.standard_normal(64)).float() for _ in range(4))
        assert torch.allclose(row.theta, -0.5 * 2.0 * 3.0 * noise / 4, atol=1e-5)


def test_nothing_is_drawn_from_global_generators(
    make_bench: Any, random_records: Any, make_phase: Any, untouched_global_generator: None
) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 (what is looked at is the legacy global generator)
    bench = make_bench("model.head=trained")
    run(bench, random_records(LENGTHS), make_jobs(make_phase(0.5, 1.0), PARTS), start(bench))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_a_job_shows_nothing_of_its_streams() -> None:
    """What a log line or a debugger prints of a job must not let anyone redraw its noise."""
    job = TrainingJob(
        records=np.arange(3),
        phase=None,  # type: ignore[arg-type]
        sampling=SecretRoot.seeded(0).numpy("s"),
        noise=HostNoise(SecretRoot.seeded(0).numpy("n")),
    )
    for stream in (job.sampling, job.noise.generator):  # type: ignore[attr-defined]
        assert all(str(part) not in repr(job) for part in stream.bit_generator.state["state"]["keysetup"])
    assert "sampling" not in repr(job)
    assert "noise" not in repr(job)
