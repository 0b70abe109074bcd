"""The schema of a run: YAML plus ``key=value`` overrides, checked before anything else happens.

Every field is documented by the string under it; the same strings become the JSON Schema that editors read
(``python -m distgan schema``). Sections are pure data: the package that a section belongs to builds from it.
"""

from __future__ import annotations

from distgan.config.data import DataConfig
from distgan.config.loading import dump_config, flatten, json_schema, load_config, parse_config
from distgan.config.objective import (
    FeatureMatchingConfig,
    GradientPenaltyConfig,
    HistoricalAveragingConfig,
    InstanceNoiseConfig,
    LabelSmoothingConfig,
    ObjectiveConfig,
    WeightClippingConfig,
    ZeroCenteredPenaltyConfig,
)
from distgan.config.paths import cache_folder
from distgan.config.players import (
    DiscriminatorConfig,
    EMAConfig,
    GeneratorConfig,
    GrowthConfig,
    MinibatchDiscriminationConfig,
    MinibatchStddevConfig,
    NetworkConfig,
    OptimizerConfig,
)
from distgan.config.run import ARCHITECTURES, Config
from distgan.config.training import (
    CheckpointConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    ExtraCriticStepsConfig,
    MonitoringConfig,
    TrackerConfig,
    TrainingConfig,
)

__all__ = [
    "ARCHITECTURES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiscriminatorConfig",
    "EMAConfig",
    "EarlyStoppingConfig",
    "EvaluationConfig",
    "ExtraCriticStepsConfig",
    "FeatureMatchingConfig",
    "GeneratorConfig",
    "GradientPenaltyConfig",
    "GrowthConfig",
    "HistoricalAveragingConfig",
    "InstanceNoiseConfig",
    "LabelSmoothingConfig",
    "MinibatchDiscriminationConfig",
    "MinibatchStddevConfig",
    "MonitoringConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "TrackerConfig",
    "TrainingConfig",
    "WeightClippingConfig",
    "ZeroCenteredPenaltyConfig",
    "cache_folder",
    "dump_config",
    "flatten",
    "json_schema",
    "load_config",
    "parse_config",
]
