"""Reading a model's files with transformers: quietly, without dropout, and without touching global random state."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedlora.errors import ModelError
from fedlora.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_network(
    source: ModelSource, *, num_labels: int | None, dtype: torch.dtype, attention: str
) -> tuple[PreTrainedModel, list[str]]:
    """The model on the CPU without dropout, and the names of parameters its checkpoint has no weights for.

    Args:
        source: a located model.
        num_labels: of a sequence-classification head; None reads the bare base model, without its pooler.
        dtype: of all weights.
        attention: "eager", "sdpa", or "auto" for transformers' choice.

    Raises:
        ModelError: unreadable or incomplete files, or no such attention kernel.
    """
    import transformers
    from safetensors import SafetensorError

    auto = transformers.AutoModel if num_labels is None else transformers.AutoModelForSequenceClassification
    kernel = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            network, report = auto.from_pretrained(
                source.folder,
                config=_config(source.folder, num_labels),
                dtype=dtype,
                ignore_mismatched_sizes=True,  # a head for another number of labels is as good as none
                output_loading_info=True,
                local_files_only=True,
                **kernel,
            )
    except (OSError, ValueError, ImportError, RuntimeError, LookupError, SafetensorError) as error:
        raise ModelError(f"cannot load model {source.reference}: {_first_line(error)}") from error
    if num_labels is None and getattr(network, "pooler", None) is not None:
        network.pooler = None  # we pool ourselves; many checkpoints carry no weights for it
    _silence_dropout(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)  # DeBERTa pins its q_bias to float32 and then multiplies it
    return network, _missing_parameters(source, network, report)


def load_tokenizer(source: ModelSource, network: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right; the network is told which token pads.

    Raises:
        ModelError: unreadable, or without both a padding and an end token.
    """
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a malformed tokenizer.json
        raise ModelError(f"cannot load the tokenizer of {source.reference}: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {source.reference} has neither padding nor end token; add a pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = min(tokenizer.model_max_length, _positions(network))
    network.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _positions(network: PreTrainedModel) -> int:
    """Tokens that the model has positions for; many tokenizers do not say, and more would be an index error."""
    positions = getattr(network.config, "max_position_embeddings", None) or sys.maxsize
    counts_from_padding = network.config.model_type in ("roberta", "xlm-roberta")
    return int(positions) - (network.config.pad_token_id + 1 if counts_from_padding else 0)


def _config(folder: Path, num_labels: int | None) -> Any:
    """The model's config, every dropout probability zero: private training adds noise enough."""
    from transformers import AutoConfig

    labels = {} if num_labels is None else {"num_labels": num_labels}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **labels)
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    config.use_cache = False  # of decoders: nothing is generated
    return config


def _silence_dropout(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _missing_parameters(source: ModelSource, network: PreTrainedModel, report: dict[str, Any]) -> list[str]:
    """Parameters that were newly initialised, in model order: the head's, and a native pooler's.

    Raises:
        ModelError: anything else is missing; such a model would run on random weights.
    """
    reported = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    missing = [name for name, _ in network.named_parameters() if name in reported]
    prefix = "" if network.base_model is network else f"{network.base_model_prefix}."
    lost = [name for name in missing if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")]
    if lost:
        raise ModelError(
            f"the weights of {source.reference} do not fit its config.json: {len(lost)} parameters are missing or of "
            f"another shape, such as {lost[0]}; get a complete copy of the model"
        )
    return missing


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, no report of a head that is new on purpose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
