"""The configuration of a training run: `TrainConfig`, and how its values are composed.

Each field of `TrainConfig` is one option of `train`: `--batch-size` on the command line,
`batch_size` in YAML, `ACCUM_TRAINER_BATCH_SIZE` in the environment. A field carries its help and
limits; the command line's options, the written YAML and the error messages derive from it. Imports
no torch.
"""

from accum_trainer.config.compose import Composed, compose
from accum_trainer.config.names import nearest_name, why_needless
from accum_trainer.config.option import kind_of
from accum_trainer.config.sources import ENVIRONMENT_PREFIX, OTHER_ENVIRONMENT
from accum_trainer.config.train_config import OPTIONS, SECTIONS, TrainConfig

__all__ = [
    "ENVIRONMENT_PREFIX",
    "OPTIONS",
    "OTHER_ENVIRONMENT",
    "SECTIONS",
    "Composed",
    "TrainConfig",
    "compose",
    "kind_of",
    "nearest_name",
    "why_needless",
]
