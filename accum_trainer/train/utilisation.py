"""Model FLOPs utilisation: what a window needed, against what the devices could have done.

The measure of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B), of useful work only: no
padding and no recomputed forward count, and waiting for data is part of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

from accum_trainer.speed.flops import TrainingFlops, training_flops
from accum_trainer.speed.peaks import peak_flops
from accum_trainer.train.setup import Training
from accum_trainer.update import Update


@dataclass(frozen=True)
class Utilisation:
    """Turns windows into utilisation.

    Attributes:
        flops: of the model.
        peak: operations per second of all devices together; None if that is not known.
    """

    flops: TrainingFlops
    peak: float | None

    @classmethod
    def of_training(cls, training: Training) -> Utilisation:
        """Of a training's model on its devices, which are taken to be alike."""
        engine, given = training.accumulator.engine, training.config.peak_tflops
        peak = peak_flops(engine.device, engine.mixed_precision) if given is None else given * 1e12
        return cls(
            training_flops(engine.unwrap(training.model), training.rows.lengths),
            None if peak is None else peak * engine.world_size,
        )

    def of(self, update: Update, seconds: float) -> float | None:
        """The share of the devices' peak that a window used, 0 to 1; None if it is not known.

        Args:
            seconds: of the window, waiting for data included.
        """
        if self.peak is None:
            return None
        return self.flops.of(update.num_tokens, update.num_targets) / (seconds * self.peak)
