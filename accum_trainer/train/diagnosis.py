"""What is known of the window with which a run diverged: process, parameter and samples.

Knows the training, and how the global order deals its samples; ends nothing.
"""

from __future__ import annotations

import math

from accum_trainer.train.setup import Training
from accum_trainer.update import Update
from accum_trainer.window import Window
from accum_trainer.window_plan import global_order

# Samples that a message names.
_MOST_NAMED = 20


def describe_window(training: Training, window: Window, update: Update) -> str:
    """The last window, in words. Collective."""
    losses = training.accumulator.engine.gather_objects(float(window.loss_sum))
    wrong = [
        f"{loss} on process {rank}" for rank, loss in enumerate(losses) if not math.isfinite(loss)
    ]
    samples = samples_of(training, update.num_samples)
    named = ", ".join(map(str, samples[:_MOST_NAMED]))
    more = f" and {len(samples) - _MOST_NAMED} more" if len(samples) > _MOST_NAMED else ""
    first = update.nonfinite_parameter
    gradient = f"the first parameter whose gradient has inf or nan is {first}; " if first else ""
    return (
        f"in the last of them the loss was {' and '.join(wrong) or 'finite, its gradient not'}; "
        f"{gradient}it held samples {named}{more} of the training data, counted from 0"
    )


def samples_of(training: Training, num_samples: int) -> list[int]:
    """The rows of the last finished window."""
    position = training.windows.state_dict()
    order = global_order(len(training.rows), training.config.seed, int(position["epoch"]))
    index, count = training.schedule.shard
    end = int(position["samples_consumed"])
    return sorted(order[index::count][end - num_samples : end].tolist())
