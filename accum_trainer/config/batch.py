"""The section Batch: sizes of windows and micro-batches, and how samples lie in them."""

from dataclasses import dataclass

from accum_trainer.batch_plan import parse_rank_weights
from accum_trainer.config.option import Section, option
from accum_trainer.errors import ConfigError


@dataclass(frozen=True)
class BatchOptions(Section):
    """Sizes in samples unless they are called tokens."""

    batch_size: int | str | None = option(
        None,
        "B, the micro-batch: most samples in one forward/backward on one process; packed, more "
        "short ones in the memory of B; auto finds the largest that fits the device. Default: 4, "
        "or what --max-tokens-per-micro-batch allows.",
        minimum=1,
        word="auto",
    )
    max_tokens_per_micro_batch: int | None = option(
        None,
        "Most tokens in one forward/backward, padding included, instead of B: short samples share "
        "a micro-batch. Needs --global-batch-size.",
        minimum=1,
    )
    gradient_accumulation_steps: int | None = option(
        None,
        "K, micro-batches per update on one process. Default: 1, or what --global-batch-size "
        "needs.",
        minimum=1,
    )
    global_batch_size: int | None = option(
        None,
        "B_eff, samples per optimizer update over all processes; K follows from it.",
        minimum=1,
    )
    grad_sync: str = option(
        "auto",
        "When processes exchange gradients. Same update, different traffic and memory.",
        choices=("auto", "once-per-window", "every-microbatch"),
    )
    weight_sync: str = option(
        "auto",
        "When FSDP2 and ZeRO-3 gather weights. Same update: once-per-window keeps them whole.",
        choices=("auto", "once-per-window", "every-microbatch"),
    )
    accumulation_dtype: str = option(
        "float32",
        "The dtype that gradients accumulate in.",
        choices=("float32", "bfloat16"),
    )
    rank_weights: str | None = option(
        None,
        "Each process's share of the window, such as 2,1 if the first GPU is twice as fast; auto "
        "measures them.",
    )
    layout: str = option(
        "auto",
        "How samples lie in a micro-batch: padded to a rectangle, or packed end to end; auto packs "
        "on a CPU, and for flash and flex attention.",
        choices=("auto", "padded", "packed"),
    )
    recover_from_oom: str = option(
        "auto",
        "Split a micro-batch that runs out of memory in two and run it again; always: also a "
        "window's last one, by exchanging gradients after its backward.",
        choices=("auto", "always", "never"),
    )
    loss_on_targets: str = option(
        "auto",
        "Compute logits only at targets; off computes them at every position, as the model does.",
        choices=("auto", "off"),
    )
    router_loss: str = option(
        "auto",
        "Add the load-balancing loss of a mixture of experts; auto: if its configuration has a "
        "coefficient above 0.",
        choices=("auto", "off"),
    )
    noise_every: int | str = option(
        "auto",
        "Measure the noise of the gradient, which says how large B_eff should be, in every N-th "
        "window: it is cut at random, with the same update. 0 measures none; auto keeps the cost "
        "under 1 % of the time.",
        minimum=0,
        word="auto",
    )
    pad_to_multiple_of: int | None = option(
        None,
        "Round padded lengths up to a multiple. Default: 8 on a GPU, 1 on a CPU.",
        minimum=1,
    )

    def _check_rules(self) -> None:
        super()._check_rules()
        sized_by_window = (
            self.global_batch_size is not None and self.gradient_accumulation_steps is None
        )
        if self.max_tokens_per_micro_batch is not None:
            if self.batch_size is not None:
                raise ConfigError(
                    f"batch_size={self.batch_size} and "
                    f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} both say "
                    "how large a micro-batch may be; give one of them"
                )
            if not sized_by_window:
                raise ConfigError(
                    f"max_tokens_per_micro_batch={self.max_tokens_per_micro_batch} makes as many "
                    "micro-batches as the samples need; give global_batch_size, and leave "
                    "gradient_accumulation_steps out"
                )
        elif self.batch_size == "auto" and not sized_by_window:
            raise ConfigError(
                "batch_size=auto makes as many micro-batches as the device needs; give "
                "global_batch_size, and leave gradient_accumulation_steps out"
            )
        elif self.batch_size is None:
            self._set("batch_size", 4)
        if self.gradient_accumulation_steps is None and self.global_batch_size is None:
            self._set("gradient_accumulation_steps", 1)
        if self.layout == "packed" and self.pad_to_multiple_of is not None:
            raise ConfigError(
                f"pad_to_multiple_of={self.pad_to_multiple_of} has no effect with layout=packed, "
                "which does not pad; leave one of them out"
            )
        parse_rank_weights(self.rank_weights)
