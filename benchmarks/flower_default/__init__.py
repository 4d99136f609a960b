"""A federation as Flower's own quickstart has it, brought to a deployment: what fedlora's courier is compared with.

After `examples/quickstart-huggingface` of github.com/adap/flower in its Message API form: a ClientApp that imports
torch, datasets, transformers and peft, and that loads model and records for every message, because Flower's deployment
starts a process for every message; FedAvg.start on the server. Where the example leaves a choice, the quicker way is
taken: only LoRA's B travels; there is no round of evaluation; records come from a folder that `save_to_disk` wrote, as
Flower's guide to deployment has it, whose tokenised form is cached there.
"""
