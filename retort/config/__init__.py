"""The run file: one TOML describes one run, one table per concern.

Sources, strongest first: `--set section.key=value`, environment `RETORT_SECTION__KEY`, the TOML file, the defaults in
`tables`. `RETORT_SECTION__KEY_FILE` names a file that holds the value, for secrets.
Unknown keys are refused with the nearest right name. Addresses and secrets may come from the environment only.
"""

from retort.config.errors import ConfigError, MissingDependencyError
from retort.config.loading import ENV_PREFIX, dump_config, load_config, secret
from retort.config.tables import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    RedisConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TimeoutConfig,
    TrackerName,
    TrainerConfig,
    ValidationConfig,
    WeightSyncConfig,
)

__all__ = [
    "ENV_PREFIX",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "LoraConfig",
    "MethodConfig",
    "MissingDependencyError",
    "ModelConfig",
    "RedisConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "TimeoutConfig",
    "TrackerName",
    "TrainerConfig",
    "ValidationConfig",
    "WeightSyncConfig",
    "dump_config",
    "load_config",
    "secret",
]
