"""One run's configuration: its keys (`sections`), what they may not be together (`combinations`), the whole
(`run_config`). Knows no torch and starts fast.
"""

from fedlora.config.run_config import SECTIONS, RunConfig, Scalar, parse_override
from fedlora.config.sections import (
    AdapterConfig,
    DataConfig,
    EngineConfig,
    FederationConfig,
    ModelConfig,
    PrivacyConfig,
    RunSection,
    Task,
    TrainingConfig,
)

__all__ = [
    "SECTIONS",
    "AdapterConfig",
    "DataConfig",
    "EngineConfig",
    "FederationConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RunConfig",
    "RunSection",
    "Scalar",
    "Task",
    "TrainingConfig",
    "parse_override",
]
