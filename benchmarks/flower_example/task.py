"""Model, data, train and test of the example: plain transformers, PEFT and Opacus."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from opacus import PrivacyEngine
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from fedlora.config import RunConfig
from fedlora.data.glue import Records, load_records
from fedlora.data.partition import partition
from fedlora.randomness import PublicSeed

warnings.filterwarnings("ignore", category=UserWarning)

Settings = Mapping[str, Any]
State = dict[str, torch.Tensor]


def get_model(settings: Settings) -> nn.Module:
    """The base model under PEFT, read anew or, with `model = "cached"`, once in a process."""
    load = _kept_model if settings["model"] == "cached" else _load_model
    return load(settings["model-folder"], settings["rank"], settings["alpha"])


def _load_model(folder: str, rank: int, alpha: float) -> nn.Module:
    """Head and A frozen; they are the same everywhere, from one seed."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"
    )
    adapter = LoraConfig(r=rank, lora_alpha=int(alpha), target_modules=["query", "value"], lora_dropout=0.0)
    model: nn.Module = get_peft_model(base, adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    torch.seed()  # noise and batches must not follow from it
    return model


_kept_model = functools.cache(_load_model)
_kept_tokenizer = functools.cache(AutoTokenizer.from_pretrained)


def get_state(model: nn.Module) -> State:
    """What travels: B alone."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_state(model: nn.Module, state: State) -> None:
    model.load_state_dict(state, strict=False)


@functools.lru_cache(maxsize=1)
def _federated_dataset(generated_records: int, partitions: int) -> tuple[Records, list[Any]]:
    """All records and who holds which, cached per process like the examples' FederatedDataset."""
    config = RunConfig.from_mapping({}, [f"data.generated_records={generated_records}"])
    seed = PublicSeed.from_int(0)
    records = load_records("sst2", "generated", "train", generated_records=generated_records, seed=seed)
    return records, partition(config.data, partitions, records, seed)


def load_train_data(settings: Settings, partition_id: int, partitions: int) -> DataLoader[Any]:
    """One client's records, tokenised, in batches."""
    records, parts = _federated_dataset(settings["generated-records"], partitions)
    own = parts[partition_id]
    return _loader(settings, [records.texts[0][i] for i in own], records.labels[own], settings["batch-size"], True)


def load_test_data(settings: Settings) -> DataLoader[Any]:
    """The public validation split."""
    generated, seed = settings["generated-records"], PublicSeed.from_int(0)
    records = load_records("sst2", "generated", "validation", generated_records=generated, seed=seed)
    return _loader(settings, records.texts[0], records.labels, 64, False)


def _loader(settings: Settings, texts: list[str], labels: Any, batch_size: int, shuffle: bool) -> DataLoader[Any]:
    load = _kept_tokenizer if settings["model"] == "cached" else AutoTokenizer.from_pretrained
    tokenizer = load(settings["model-folder"])
    encoded = tokenizer(texts, truncation=True, max_length=128, padding=False)
    rows = [
        {**{key: values[i] for key, values in encoded.items()}, "labels": int(labels[i])} for i in range(len(texts))
    ]
    collator = DataCollatorWithPadding(tokenizer=tokenizer)
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=collator)  # type: ignore[arg-type]


def train(model: nn.Module, loader: DataLoader[Any], settings: Settings) -> float:
    """One epoch of DP-SGD in place; ε of this message alone, as the example reports it."""
    model.train()
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=settings["learning-rate"]
    )
    engine = PrivacyEngine(secure_mode=False)
    private, optimizer, private_loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=settings["noise-multiplier"],
        max_grad_norm=settings["max-grad-norm"],
    )
    criterion = nn.CrossEntropyLoss()
    for batch in private_loader:
        optimizer.zero_grad()
        labels = batch.pop("labels")
        criterion(private(**batch).logits, labels).backward()
        optimizer.step()
    private.to_standard_module()  # takes Opacus' hooks off a model that is used again
    return float(engine.get_epsilon(delta=settings["target-delta"]))


def test(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Accuracy."""
    model.eval()
    correct = count = 0
    with torch.no_grad():
        for batch in loader:
            labels = batch.pop("labels")
            correct += int((model(**batch).logits.argmax(dim=1) == labels).sum())
            count += len(labels)
    return correct / count
