"""The arithmetic of gradient accumulation: batch sizes, updates, warm-up, learning rates.

Pure functions of integers and floats; standard library only, so that `accum-trainer plan` answers
at once.

    B      micro_batch_size               samples in one forward/backward on one process
    K      gradient_accumulation_steps    micro-batches per update on one process
    W      world_size                     processes that share the gradient
    B_eff  global_batch_size              samples per optimizer update = B x K x W, or a little less
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accum_trainer.errors import ConfigError

LR_SCALINGS = ("none", "linear", "sqrt")
SCHEDULES = ("constant", "linear", "cosine")


def positive_int(name: str, value: Any) -> int:
    """Return `value` as an int of at least 1, or raise a ConfigError that names it.

    Booleans, floats and text are refused rather than converted: `K = True` or `K = 2.5` is a
    mistake.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is not an integer; give a whole number of at least 1")
    if value < 1:
        raise ConfigError(f"{name}={value} is below 1; give a whole number of at least 1")
    return value


@dataclass(frozen=True, init=False)
class BatchPlan:
    """How one effective batch is cut: `global_batch_size = micro_batch_size *
    gradient_accumulation_steps * world_size`.

    Give any arguments that determine the four numbers; the rest follows. If several answers
    remain, `world_size` becomes 1, then `gradient_accumulation_steps`. A global batch that the
    others do not divide keeps its size: K is rounded up, and some micro-batches of each window are
    smaller (`is_whole` is False).

    Args:
        micro_batch_size: B, most samples in one forward/backward on one process.
        gradient_accumulation_steps: K, micro-batches per update on one process.
        world_size: W, processes that share the gradient.
        global_batch_size: B_eff, samples per optimizer update.
        num_samples: samples in one epoch, if known; gives `updates_per_epoch` and `tail_samples`.

    Raises:
        ConfigError: a value below 1 or not an integer; values that contradict each other; too few
            values.
    """

    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    global_batch_size: int
    num_samples: int | None

    def __init__(
        self,
        micro_batch_size: int | None = None,
        gradient_accumulation_steps: int | None = None,
        world_size: int | None = None,
        global_batch_size: int | None = None,
        num_samples: int | None = None,
    ) -> None:
        given = {
            "micro_batch_size": micro_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "world_size": world_size,
            "global_batch_size": global_batch_size,
        }
        for name, value in given.items():
            if value is not None:
                positive_int(name, value)
        if num_samples is not None:
            positive_int("num_samples", num_samples)
        b, k, w, b_eff = _solve(
            micro_batch_size, gradient_accumulation_steps, world_size, global_batch_size
        )
        object.__setattr__(self, "micro_batch_size", b)
        object.__setattr__(self, "gradient_accumulation_steps", k)
        object.__setattr__(self, "world_size", w)
        object.__setattr__(self, "global_batch_size", b_eff)
        object.__setattr__(self, "num_samples", num_samples)

    def for_samples(self, num_samples: int) -> BatchPlan:
        """The same plan, for an epoch of `num_samples`."""
        found = copy.copy(self)
        object.__setattr__(found, "num_samples", positive_int("num_samples", num_samples))
        return found

    @property
    def updates_per_epoch(self) -> int | None:
        """Updates in one pass over `num_samples`, the short last window included."""
        if self.num_samples is None:
            return None
        return math.ceil(self.num_samples / self.global_batch_size)

    @property
    def tail_samples(self) -> int | None:
        """Samples in the short last window of an epoch; 0 if all windows are whole."""
        return None if self.num_samples is None else self.num_samples % self.global_batch_size

    @property
    def is_whole(self) -> bool:
        """Whether B x K x W is the global batch; else it exceeds it, by less than B x W."""
        return self._product == self.global_batch_size

    @property
    def _product(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    def describe(self) -> str:
        """One line for people: `B 4 x K 8 x W 2 = effective batch 64`."""
        product = (
            f"B {self.micro_batch_size} x K {self.gradient_accumulation_steps} x W "
            f"{self.world_size}"
        )
        if self.is_whole:
            return f"{product} = effective batch {self.global_batch_size}"
        return f"at most {product} = {self._product}, effective batch {self.global_batch_size}"


def _solve(
    b: int | None, k: int | None, w: int | None, b_eff: int | None
) -> tuple[int, int, int, int]:
    """Solve B * K * W = B_eff for what is None."""
    if b_eff is None:
        if b is None:
            raise ConfigError(
                "neither micro_batch_size nor global_batch_size is given; give one of them (and "
                "gradient_accumulation_steps or world_size if they are not 1)"
            )
        k, w = k or 1, w or 1
        return b, k, w, b * k * w
    if b is not None and k is not None and w is None:
        w = _quotient(
            "world_size", b_eff, {"micro_batch_size": b, "gradient_accumulation_steps": k}
        )
    w = w or 1
    if k is None:  # rounded up: micro-batches hold at most B samples
        b = b or -(-b_eff // w)
        return b, -(-b_eff // (b * w)), w, b_eff
    if b is None:
        b = _quotient(
            "micro_batch_size", b_eff, {"gradient_accumulation_steps": k, "world_size": w}
        )
    if b * k * w != b_eff:
        per_step = b * w
        remedy = f"leave gradient_accumulation_steps out (it would be {-(-b_eff // per_step)})"
        raise ConfigError(
            f"global_batch_size={b_eff} contradicts micro_batch_size={b} x "
            f"gradient_accumulation_steps={k} x world_size={w} = {b * k * w}; {remedy}"
        )
    return b, k, w, b_eff


def _quotient(solving_for: str, b_eff: int, factors: dict[str, int]) -> int:
    """Return b_eff / product(factors), or say which neighbouring batch sizes would work."""
    product = math.prod(factors.values())
    if b_eff % product == 0:
        return b_eff // product
    stated = " x ".join(f"{name}={value}" for name, value in factors.items())
    below, above = b_eff // product * product, -(-b_eff // product) * product
    choices = f"{below} or {above}" if below else f"{above}"
    raise ConfigError(
        f"global_batch_size={b_eff} is not a multiple of {stated} = {product}, so {solving_for} "
        f"would not be whole; use global_batch_size={choices}, or give micro_batch_size and leave "
        "gradient_accumulation_steps out"
    )


def scale_lr(
    lr: float, scaling: str, global_batch_size: int, lr_base_batch_size: int | None
) -> float:
    """Scale a learning rate found at `lr_base_batch_size` to `global_batch_size` samples per
    update.

    linear: lr * B_eff / base (Goyal et al. 2017, arXiv:1706.02677, section 2.1, for SGD);
    sqrt: lr * sqrt(B_eff / base) (Krizhevsky 2014, arXiv:1404.5997, section 5; Malladi et al. 2022,
    arXiv:2205.10287, for Adam). Both are starting points, to be checked by a sweep.

    Raises:
        ConfigError: an unknown scaling, or a scaling without the batch size that the rate was found
            at.
    """
    if scaling not in LR_SCALINGS:
        raise ConfigError(
            f"lr_scaling={scaling!r} is not known; use one of {', '.join(LR_SCALINGS)}"
        )
    if scaling == "none":
        return lr
    if lr_base_batch_size is None:
        raise ConfigError(
            f"lr_scaling={scaling} needs lr_base_batch_size, the batch size at which lr={lr:g} was "
            "found; give lr_base_batch_size, or lr_scaling=none"
        )
    ratio = global_batch_size / positive_int("lr_base_batch_size", lr_base_batch_size)
    return lr * (ratio if scaling == "linear" else math.sqrt(ratio))


def warmup_updates(warmup: str | int, total_updates: int, updates_per_epoch: int | None) -> int:
    """Warm-up in optimizer updates, from `100` (updates), `5%` (of all updates) or `0.5ep`
    (epochs).

    Given as a share or in epochs, warm-up covers the same samples whatever the batch: it is
    recomputed for K. Fractions are rounded up, so that a wanted warm-up never becomes none.

    Raises:
        ConfigError: unreadable text, a negative number, more warm-up than training, or epochs of
            unknown length.
    """
    kind, amount = parse_warmup(warmup)
    if kind == "updates":
        updates = int(amount)
    elif kind == "ratio":
        updates = math.ceil(total_updates * amount - 1e-9)
    elif updates_per_epoch is None:
        raise ConfigError(
            f"warmup={warmup} counts epochs, but the data has no length; give updates or a "
            "percentage"
        )
    else:
        updates = math.ceil(updates_per_epoch * amount - 1e-9)
    if updates > total_updates:
        raise ConfigError(
            f"warmup={warmup} is {updates} updates, but the run has only {total_updates}; "
            f"shorten the warm-up or train longer"
        )
    return updates


def parse_warmup(warmup: str | int) -> tuple[str, float]:
    """Read a warm-up: ("updates", n), ("ratio", 0 to 1) or ("epochs", x)."""
    text = str(warmup).strip()
    for suffix, kind, scale in (("%", "ratio", 0.01), ("ep", "epochs", 1.0), ("", "updates", 1.0)):
        if not text.endswith(suffix):
            continue
        try:
            amount = float(text[: len(text) - len(suffix)]) * scale
        except ValueError:
            break
        if not 0 <= amount < 2**53 or (kind == "updates" and amount != int(amount)):
            break
        if kind == "ratio" and amount > 1:
            break
        return kind, amount
    raise ConfigError(
        f"warmup={warmup!r} is not a warm-up; give updates (100), a share of the run (5%) or "
        "epochs (0.5ep)"
    )


def parse_shard(shard: str | None) -> tuple[int, int]:
    """Read a shard: `1/4` is (1, 4), every fourth sample of the global order from the second on;
    None is (0, 1), all.

    Raises:
        ConfigError: not two integers with 0 <= first < second.
    """
    if shard is None:
        return 0, 1
    first, slash, every = map(str.strip, shard.partition("/"))
    if (
        not slash
        or not first.isdecimal()
        or not every.isdecimal()
        or len(shard) > 40  # Python reads 4,300 digits
        or int(first) >= int(every)
    ):
        raise ConfigError(
            f"shard={shard} is not a shard; give I/N with I from 0 to N - 1, such as 0/4"
        )
    return int(first), int(every)


def samples_of_shard(num_samples: int, shard: str | None) -> int:
    """How many of an epoch's samples belong to a shard, as `parse_shard` reads it.

    Raises:
        ConfigError: none.
    """
    first, every = parse_shard(shard)
    share = len(range(first, num_samples, every))
    if share == 0:
        raise ConfigError(
            f"shard={first}/{every} of {num_samples} samples is empty; use at most {num_samples} "
            "shards"
        )
    return share


def parse_rank_weights(weights: str | None) -> tuple[float, ...] | None:
    """Read shares per process: `2,1` is (2.0, 1.0); None where they are equal, or to be measured
    (`auto`).

    Raises:
        ConfigError: not numbers above 0.
    """
    if weights is None or weights == "auto":
        return None
    try:
        shares = tuple(float(part) for part in weights.replace(":", ",").split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < math.inf for share in shares):
        raise ConfigError(
            f"rank_weights={weights} are not shares; give a number above 0 for each process (2,1), "
            "or auto"
        )
    return shares


def lr_factor(schedule: str, warmup: int, total_updates: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of updates done (0, 1, 2, ...).

    Linear from 1/(warmup+1) over the first `warmup` updates to 1, then constant, linear to 0, or
    half a cosine to 0 at `total_updates`. A function of updates alone, so the rate after u updates
    knows nothing of K or W.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"scheduler={schedule!r} is not known; use one of {', '.join(SCHEDULES)}")

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / (warmup + 1)
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (update - warmup) / max(1, total_updates - warmup))
        return (
            1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        )

    return factor
