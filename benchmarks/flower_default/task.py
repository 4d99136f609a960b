"""Model, records and training of the quickstart: plain datasets, transformers and PEFT."""

from __future__ import annotations

from typing import Any

import torch
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding


def get_model(folder: str, rank: int) -> nn.Module:
    """The base model under PEFT; only B is trained. A comes from one seed, so that it is the same everywhere."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=["query", "value"], lora_dropout=0.0)
    model: nn.Module = get_peft_model(base, adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


def get_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What travels: B alone."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_data(folder: str, model_folder: str, batch_size: int) -> DataLoader[Any]:
    """This node's records, tokenised, in batches."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    records = load_from_disk(folder).map(
        lambda batch: tokenizer(batch["sentence"], truncation=True, max_length=128), batched=True
    )
    records = records.remove_columns("sentence").rename_column("label", "labels")
    return DataLoader(
        records,
        batch_size=batch_size,
        shuffle=True,
        collate_fn=DataCollatorWithPadding(tokenizer=tokenizer),
    )


def train(model: nn.Module, loader: DataLoader[Any], steps: int) -> float:
    """So many steps of SGD in place; the last loss."""
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    loss = torch.zeros(())
    for _, batch in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    return float(loss)
