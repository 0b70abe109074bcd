"""The schema of a run: YAML plus ``key=value`` overrides, checked before anything else happens.

Every field is documented by the string under it; the same strings become the JSON Schema that editors read
(``python -m distgan schema``). Sections are pure data: the package that a section belongs to builds from it.
"""

from __future__ import annotations

from distgan.config.architectures import MinibatchDiscriminationConfig, MinibatchStddevConfig
from distgan.config.autoencoder import AutoencoderConfig
from distgan.config.data import DataConfig, StagesConfig
from distgan.config.evaluation import DetectorConfig, EvaluationConfig, MetricConfig
from distgan.config.fields import ScheduleConfig
from distgan.config.loading import (
    dump_config,
    flatten,
    is_run_folder,
    json_schema,
    load_config,
    parse_config,
    plain_values,
)
from distgan.config.objective import (
    AdversarialConfig,
    FeatureMatchingConfig,
    GradientPenaltyConfig,
    HistoricalAveragingConfig,
    InstanceNoiseConfig,
    LabelSmoothingConfig,
    ObjectiveConfig,
    WeightClippingConfig,
    ZeroCenteredPenaltyConfig,
)
from distgan.config.objective.alignment import AlignmentConfig
from distgan.config.objective.augmentation import AugmentationConfig, ControllerConfig
from distgan.config.objective.terms import TermConfig
from distgan.config.players import (
    DiscriminatorConfig,
    EMAConfig,
    GeneratorConfig,
    GrowthConfig,
    NetworkConfig,
    OptimizerConfig,
)
from distgan.config.run import Config
from distgan.config.training import (
    CheckpointConfig,
    DivergenceConfig,
    EarlyStoppingConfig,
    ExtraCriticStepsConfig,
    MonitoringConfig,
    TrackerConfig,
    TrainingConfig,
)

__all__ = [
    "AdversarialConfig",
    "AlignmentConfig",
    "AugmentationConfig",
    "AutoencoderConfig",
    "CheckpointConfig",
    "Config",
    "ControllerConfig",
    "DataConfig",
    "DetectorConfig",
    "DiscriminatorConfig",
    "DivergenceConfig",
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
    "MetricConfig",
    "MinibatchDiscriminationConfig",
    "MinibatchStddevConfig",
    "MonitoringConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "StagesConfig",
    "TermConfig",
    "TrackerConfig",
    "TrainingConfig",
    "WeightClippingConfig",
    "ZeroCenteredPenaltyConfig",
    "dump_config",
    "flatten",
    "is_run_folder",
    "json_schema",
    "load_config",
    "parse_config",
    "plain_values",
]
