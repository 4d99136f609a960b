"""Classifiers of a known shape with random weights: for speed weights do not matter, and nothing has to be fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.contenders import Base, Execution
from fedlora.adapters.methods import layout as layouts
from fedlora.engine.execution import DTYPES
from fedlora.models import Classifier
from fedlora.models.source import ModelSource
from fedlora.randomness import PublicSeed

RANK = 8
ROBERTA = {"model_type": "roberta", "type_vocab_size": 1, "max_position_embeddings": 514, "vocab_size": 50265}
SHAPES: dict[str, Mapping[str, Any]] = {
    "RoBERTa-large": ROBERTA
    | {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024, "intermediate_size": 4096},
    "MiniLM-L6": {
        "model_type": "bert",
        "vocab_size": 30522,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "hidden_size": 384,
        "intermediate_size": 1536,
    },
    "tiny": ROBERTA
    | {
        "vocab_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
    },
}


def random_base(shape: str, execution: Execution, device: torch.device) -> Base:
    """A frozen classifier of `shape` with its family's own head, and FFA-LoRA on query and value."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = AutoConfig.for_model(**SHAPES[shape], **silent, num_labels=2)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        network = AutoModelForSequenceClassification.from_config(
            config, dtype=DTYPES[execution.dtype], attn_implementation=execution.attention
        )
    for child in network.children():
        if child is not network.base_model:
            child.float()  # as `load_classifier` does: heads are float32
    no_tokenizer = cast(Any, None)  # tokens are random, and no text is read
    source = ModelSource(kind="folder", reference=f"random {shape}", folder=Path())
    classifier = Classifier(network, no_tokenizer, source, head_kind="frozen", pooling="native", num_labels=2)
    modules = classifier.target_modules(("query", "value"))
    places = {path: (path,) for path in modules}
    layout = layouts.build_layout(modules, {}, places=places, rank=RANK, alpha=float(RANK))
    return Base(classifier, layout, layouts.frozen_factors(PublicSeed.from_int(0), modules, places, RANK), places)
