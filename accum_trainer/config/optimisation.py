"""The sections Length and Optimisation: how long to train, and with which schedule."""

from dataclasses import dataclass

from accum_trainer.batch_plan import LR_SCALINGS, SCHEDULES, parse_warmup
from accum_trainer.config.option import Section, option
from accum_trainer.errors import ConfigError


@dataclass(frozen=True)
class LengthOptions(Section):
    """How long a run trains: updates, epochs, hours."""

    steps: int | None = option(None, "Optimizer updates to make. Instead of --epochs.", minimum=1)
    epochs: int | None = option(
        None, "Passes over the data. Default: 1 if --steps is not given.", minimum=1
    )
    max_hours: float | None = option(
        None, "Save and stop cleanly before this many hours have passed.", above=0
    )
    notice_seconds: float | None = option(
        None,
        "Seconds from the signal that asks for a save to the end, as in SLURM's --signal=USR1@180. "
        "A run whose save takes longer says so.",
        above=0,
    )
    max_skips: int = option(
        50,
        "End the run when N of its last 2 N windows gave no update: it has diverged. fp16 needs "
        "about 16 to find its scale.",
        minimum=1,
    )
    timeout: float = option(
        1800.0,
        "End a run on several processes if no window ends for this many seconds, and say which "
        "process the others wait for.",
        above=0,
    )

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"steps={self.steps} and epochs={self.epochs} both say how long to train; give one "
                "of them"
            )
        if self.steps is None and self.epochs is None:
            self._set("epochs", 1)


@dataclass(frozen=True)
class OptimisationOptions(Section):
    """The optimizer, the learning rate over updates, and the seed."""

    lr: float = option(3e-4, "Peak learning rate, before --lr-scaling.", above=0)
    lr_scaling: str = option(
        "none",
        "Scale --lr from --lr-base-batch-size to the effective batch.",
        choices=LR_SCALINGS,
    )
    lr_base_batch_size: int | None = option(
        None,
        "The effective batch at which --lr was found.",
        minimum=1,
        only_with="lr_scaling",
    )
    scheduler: str = option("cosine", "Shape of the learning rate over updates.", choices=SCHEDULES)
    warmup: str = option("0", "Warm-up: 100 (updates), 5% (of the run) or 0.5ep (epochs).")
    max_grad_norm: float | None = option(
        1.0,
        "Clip the averaged gradient to this norm once per update; `none` for no clipping.",
        above=0,
    )
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices only.", minimum=0)
    seed: int = option(0, "Seed of weights, order of samples and dropout.", minimum=0)

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.lr_scaling != "none" and self.lr_base_batch_size is None:
            raise ConfigError(
                f"lr_scaling={self.lr_scaling} needs lr_base_batch_size, the effective batch at "
                f"which lr={self.lr:g} was found"
            )
        parse_warmup(self.warmup)
