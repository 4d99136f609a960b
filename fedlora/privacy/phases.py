"""What the phases of a run are called. Apart from their plans, so that who only looks on needs no torch."""

PROTOTYPE, FINETUNE, EVALUATION = "prototype", "finetune", "evaluation"
WARMUP, ALIGNMENT, BILEVEL = "warmup", "alignment", "bilevel"
"""Phases of a search for the modules to adapt."""
TRAINING = (WARMUP, BILEVEL, FINETUNE)
"""Those that train adapters, by `federation.rounds` rounds together."""
