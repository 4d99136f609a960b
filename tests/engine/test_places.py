"""Adapters at some of a model's modules, one for several of them, and changed in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlora.adapters.dam import ModuleMask
from fedlora.adapters.methods import layout as layouts
from fedlora.adapters.slots import AdapterLayout
from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.engine.backend import GradientBackend
from fedlora.engine.batching import Shapes
from fedlora.engine.company import Company
from fedlora.engine.expanded import ExpandedBackend
from fedlora.engine.opacus import OpacusBackend
from fedlora.engine.training import TrainingJob, train
from fedlora.errors import AdapterError, ModelError
from fedlora.federation.workbench import find_candidates
from fedlora.models import Classifier
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.noise import HostNoise
from fedlora.randomness import PublicSeed, SecretRoot
from tests.engine.reference import assert_same, loop_over_records, random_theta, untouched_classifier

RAGGED = [5, 12, 3, 9, 12, 4]
OWNER = torch.tensor([0, 1, 2, 1, 0, 2])
SEED = PublicSeed.from_int(0)
BACKENDS: dict[str, Any] = {"expanded": ExpandedBackend, "opacus": OpacusBackend}
FAMILIES = ["bert", "distilbert", "llama"]
MOST = (True, True, False, True, False, True, True)
FEW = (False, True, False, False, False, True, False, False)
"""Patterns of a mask, repeated over the candidates; of both, every type has modules that are not chosen."""


@dataclass(frozen=True)
class Plan:
    """What is to be attached to a classifier."""

    layout: AdapterLayout
    places: layouts.Places
    factors: Mapping[str, Tensor]

    def attach(self, name: str, classifier: Classifier) -> GradientBackend:
        if name == "opacus":
            pytest.importorskip("opacus")
        return BACKENDS[name](classifier, self.layout, self.factors, self.places)


def plan(
    classifier: Classifier, pattern: tuple[bool, ...], *, shared: bool, heads: bool = True, types: Any = ("all",)
) -> Plan:
    modules = classifier.target_modules(types)
    candidates = find_candidates(classifier, types)
    mask = ModuleMask(candidates, tuple(pattern[i % len(pattern)] for i in range(len(candidates))))
    places = {path: (path,) for path in mask.modules} | (dict(mask.sharing) if shared else {})
    trained = classifier.head_modules() if heads else {}
    layout = layouts.build_layout(modules, trained, places=places, rank=4, alpha=8.0)
    return Plan(layout, places, layouts.frozen_factors(SEED, modules, places, 4))


Config = Callable[..., RunConfig]


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """A tiny config with three layers, so that up to three modules share an adapter."""
    return lambda family="bert", **model: tiny_config(
        family=family, **{"n_layers" if family == "distilbert" else "num_hidden_layers": 3}, **model
    )


@pytest.fixture
def ragged(random_records: Any) -> EncodedDataset:
    return random_records(RAGGED)


def everything(dataset: EncodedDataset) -> tuple[dict[str, Tensor], Tensor]:
    return dataset.batch(np.arange(len(dataset)))


# ----------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("heads", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["chosen only", "sharing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_opacus_and_the_loop_agree(
    config: Config, ragged: EncodedDataset, family: str, shared: bool, clients: int, heads: bool
) -> None:
    settings = config(family)
    expanded, opacus = untouched_classifier(settings), untouched_classifier(settings)
    what = plan(expanded, FEW, shared=shared, heads=heads)
    assert (max(map(len, what.places.values())) > 1) == shared
    theta, owner = random_theta(what.layout, clients), OWNER % clients
    batch, labels = everything(ragged)
    wanted = loop_over_records(settings, what.layout, what.places, theta, ragged, owner)
    fast, reference = what.attach("expanded", expanded), what.attach("opacus", opacus)
    for _ in range(2):  # nothing is left behind for the next batch
        assert_same(fast.gradients(theta, batch, labels, owner), wanted)
        for client in range(clients):
            own = owner == client
            alone = reference.gradients(theta, {k: v[own] for k, v in batch.items()}, labels[own], owner[own])
            assert_same(alone, [part[own] for part in wanted])
    assert torch.allclose(fast.logits(theta[0], batch), reference.logits(theta[0], batch), atol=1e-5)


@pytest.mark.parametrize("types", [("query", "value"), ("key",), ("all",)])
@pytest.mark.parametrize("shared", [False, True])
def test_deberta_v2_record_by_record(
    config: Config, ragged: EncodedDataset, types: tuple[str, ...], shared: bool
) -> None:
    settings = config("deberta-v2")
    classifier = untouched_classifier(settings)
    what = plan(classifier, (False, True, False), shared=shared, types=types)
    theta = random_theta(what.layout, 3)
    batch, labels = everything(ragged)
    backend = what.attach("expanded", classifier)
    for _ in range(2):
        wanted = loop_over_records(settings, what.layout, what.places, theta, ragged, OWNER)
        assert_same(backend.gradients(theta, batch, labels, OWNER), wanted)


def three_alike(config: Config) -> tuple[RunConfig, Plan, Plan]:
    """One adapter at the keys of three layers, and three with that one's A."""
    settings = config()
    classifier = untouched_classifier(settings)
    modules = classifier.target_modules(["key"])
    together = {"shared/key/16x16": tuple(modules)}
    apart = {path: (path,) for path in modules}
    factor = layouts.frozen_factors(SEED, modules, together, 4)
    one, three = (layouts.build_layout(modules, {}, places=places, rank=4, alpha=8.0) for places in (together, apart))
    return settings, Plan(one, together, factor), Plan(three, apart, dict.fromkeys(apart, *factor.values()))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_shared_gradient_is_the_sum_over_its_modules(config: Config, ragged: EncodedDataset, name: str) -> None:
    settings, together, apart = three_alike(config)
    theta = random_theta(together.layout, 1)
    batch, labels = everything(ragged)
    owner = OWNER * 0
    one = together.attach(name, untouched_classifier(settings)).gradients(theta, batch, labels, owner)
    three = apart.attach(name, untouched_classifier(settings)).gradients(theta.repeat(1, 3), batch, labels, owner)
    assert (len(one), len(three)) == (1, 3)
    assert_same(one, [torch.stack(three).sum(dim=0)])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_shared_adapter_counts_once_in_the_clip(
    config: Config, ragged: EncodedDataset, make_phase: Any, name: str
) -> None:
    """Through `train`: each record moves the vector [P of one adapter] by its clipped sum over modules."""
    settings, together, apart = three_alike(config)
    theta = random_theta(together.layout, 1)
    batch, labels = everything(ragged)
    three = apart.attach("expanded", untouched_classifier(settings))
    sums = torch.stack(three.gradients(theta.repeat(1, 3), batch, labels, OWNER * 0)).sum(dim=0).double()
    bound = float(sums.norm(dim=1).median())
    wanted = (sums * (bound / sums.norm(dim=1)).clamp(max=1.0)[:, None]).sum(dim=0)
    stream = SecretRoot.seeded(0)
    job = TrainingJob(
        records=np.arange(len(RAGGED)),
        phase=make_phase(1.0, 0.0, bound),
        sampling=stream.numpy("s"),
        noise=HostNoise(stream.numpy("n")),
    )
    backend = together.attach(name, untouched_classifier(settings))
    (row,) = train(
        backend,
        ragged,
        [job],
        theta[0],
        num_steps=1,
        learning_rate=1.0,
        training=settings.training,
        shapes=Shapes(64),
    )
    moved = (theta[0] - row.theta).double() * settings.training.expected_batch_size
    assert backend.slot_sizes == (together.layout.size,)
    assert (moved - wanted).norm() < 1e-4 * wanted.norm()
    total = torch.zeros(1, together.layout.size, dtype=torch.float64)
    one = backend.gradients(theta, {k: v[:1] for k, v in batch.items()}, labels[:1], OWNER[:1])
    Clipping("flat", 1e-3).add_clipped(total, one, OWNER[:1])
    assert float(total.norm()) == pytest.approx(1e-3, rel=1e-5)


def test_a_shared_adapter_of_a_bfloat16_base(config: Config, ragged: EncodedDataset) -> None:
    settings = config()
    exact, rough = untouched_classifier(settings), untouched_classifier(settings)
    rough.backbone.bfloat16()
    what = plan(exact, FEW, shared=True)
    theta = random_theta(what.layout, 3)
    batch, labels = everything(ragged)
    wanted, got = (
        torch.cat(what.attach("expanded", base).gradients(theta, batch, labels, OWNER), dim=1)
        for base in (exact, rough)
    )
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=1).min() > 0.95


@pytest.mark.parametrize(("name", "family"), [("expanded", "bert"), ("opacus", "bert"), ("expanded", "deberta-v2")])
def test_no_record_shows_in_anothers_gradient(config: Config, name: str, family: str) -> None:
    classifier = untouched_classifier(config(family))
    backend = plan(classifier, FEW, shared=True).attach(name, classifier)
    vocabulary = len(classifier.tokenizer)
    company = Company(backend=backend, vocabulary=vocabulary, num_labels=2, device=torch.device("cpu"))
    Shapes(128, company.agreeing_rows).check(24)


# -------------------------------------------------------------------------------------------- attached, detached, again


def traces(classifier: Classifier) -> tuple[Any, ...]:
    """All that a back end could leave in a classifier; modules and parameters by identity."""
    return (
        [(path, id(module), module.training, *hooks(module)) for path, module in classifier.named_modules()],
        [(path, id(each), each.requires_grad, vars(each)) for path, each in classifier.named_parameters()],
        [path for path, _ in classifier.named_buffers()],
        sorted(vars(classifier)),
    )


def hooks(module: nn.Module) -> tuple[int, int, int, int]:
    return (
        len(module._forward_hooks),
        len(module._forward_pre_hooks),
        len(module._backward_hooks),
        len(module._backward_pre_hooks),
    )


@pytest.mark.parametrize(
    ("first", "second", "family"),
    [(first, second, "bert") for first in BACKENDS for second in BACKENDS] + [("expanded", "expanded", "deberta-v2")],
)
def test_what_is_detached_leaves_no_trace(
    config: Config, ragged: EncodedDataset, first: str, second: str, family: str
) -> None:
    settings = config(family)
    used, fresh = untouched_classifier(settings), untouched_classifier(settings)
    before = traces(used)
    batch, labels = everything(ragged)
    search, chosen = plan(used, MOST, shared=False), plan(used, FEW, shared=True)
    theta = random_theta(search.layout, 1)
    backend = search.attach(first, used)
    backend.gradients(theta, batch, labels, OWNER * 0)
    assert not torch.equal(backend.logits(theta[0], batch), fresh(batch))
    backend.detach()
    assert traces(used) == before
    assert torch.equal(used(batch), fresh(batch))
    theta = random_theta(chosen.layout, 1)
    again, alone = chosen.attach(second, used), chosen.attach(second, fresh)
    backend.detach()  # a second time: harms nobody
    for _ in range(2):
        gradients = [each.gradients(theta, batch, labels, OWNER * 0) for each in (again, alone)]
        assert all(torch.equal(got, wanted) for got, wanted in zip(*gradients, strict=True))
    assert torch.equal(again.logits(theta[0], batch), alone.logits(theta[0], batch))
    assert not torch.equal(again.logits(theta[0], batch), untouched_classifier(settings)(batch))


@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("second", BACKENDS)
def test_two_back_ends_never_stack(config: Config, ragged: EncodedDataset, first: str, second: str) -> None:
    classifier = untouched_classifier(config())
    query, value = (plan(classifier, (True,), shared=False, heads=False, types=(kind,)) for kind in ("query", "value"))
    assert not set(query.places) & set(value.places)
    theta = random_theta(query.layout, 1)
    batch, labels = everything(ragged)
    backend = query.attach(first, classifier)
    before = backend.gradients(theta, batch, labels, OWNER * 0)
    with pytest.raises(AdapterError, match="detach it first"):
        value.attach(second, classifier)
    after = backend.gradients(theta, batch, labels, OWNER * 0)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_detached_back_end_answers_no_more(config: Config, ragged: EncodedDataset, name: str) -> None:
    """It would give the bare model's logits, as if they were the adapted one's."""
    classifier = untouched_classifier(config())
    what = plan(classifier, FEW, shared=False)
    theta = random_theta(what.layout, 1)
    batch, labels = everything(ragged)
    backend = what.attach(name, classifier)
    backend.detach()
    what.attach(name, classifier)
    with pytest.raises(AdapterError, match="detached"):
        backend.logits(theta[0], batch)
    with pytest.raises(AdapterError, match="detached"):
        backend.gradients(theta, batch, labels, OWNER * 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_refused_leaves_the_classifier_alone(config: Config, name: str) -> None:
    classifier = untouched_classifier(config("deberta"))
    before = traces(classifier)
    refused = plan(classifier, (True,), shared=False, types=("in_proj", "pos_proj"))
    with pytest.raises(ModelError, match="shared by all records"):
        refused.attach(name, classifier)
    good = plan(classifier, (True,), shared=False, types=("in_proj",))
    with pytest.raises(AdapterError, match="build both from one mask"):
        BACKENDS[name](classifier, good.layout, refused.factors, refused.places)
    assert traces(classifier) == before
    good.attach(name, classifier)
