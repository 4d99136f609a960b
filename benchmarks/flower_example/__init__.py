"""What one would write from Flower's own examples to train FFA-LoRA with DP-SGD on its simulation engine.

After three examples of github.com/adap/flower:

* `examples/opacus` in its Message API form (`opacus_fl/client_app.py`): a new model, optimiser and PrivacyEngine for
  every message, Poisson loader, one epoch, ε of the message from the engine's accountant, FedAvg;
* `examples/quickstart-huggingface`: data set cached per process, tokenised for every message, padded to the longest
  text of a batch by transformers' collator;
* `examples/flowertune-llm`: base model read for every message and put under PEFT, only PEFT's own state travels.

That is the manner `model = "per message"`. With `model = "cached"` a process keeps tokenizer and PEFT model once it has
read them, which none of the examples does; optimiser and PrivacyEngine are new for every message still. Where the
examples leave a choice, the quicker way is taken: only B travels; metrics come from the server, on a model that it
keeps, and not from clients that load one for it; all of a machine's CPUs have an actor.

fedlora gives the records, their partition and the folder with the weights, the same as its own; and no engine.
"""

import os

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}
os.environ |= OFFLINE  # before flwr or ray is imported: nothing calls home
