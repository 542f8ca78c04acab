"""The sections Engine and Independent runs: where a run trains, and beside which others."""

from dataclasses import dataclass

from accum_trainer.batch_plan import parse_shard
from accum_trainer.config.option import Section, option
from accum_trainer.errors import ConfigError


@dataclass(frozen=True)
class EngineOptions(Section):
    """The device, and what DeepSpeed shards."""

    cpu: bool = option(False, "Train on the CPU even if there is a GPU.")
    zero_stage: str = option(
        "none",
        "Shard optimizer, gradients or weights with DeepSpeed ZeRO.",
        choices=("none", "zero1", "zero2", "zero3"),
        aliases={"1": "zero1", "2": "zero2", "3": "zero3"},  # as `Accumulator(zero_stage=2)`
    )
    cpu_offload: bool = option(False, "Keep ZeRO's optimizer state in host memory.")
    peak_tflops: float | None = option(
        None,
        "What one device could do at most, in 10^12 operations per second, for `mfu` in the "
        "records. Default: its maker's figure, if it is known.",
        above=0,
    )

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.cpu_offload and self.zero_stage == "none":
            raise ConfigError(
                "cpu_offload keeps ZeRO's optimizer state in host memory; give zero_stage (zero1 "
                "to zero3) too"
            )


@dataclass(frozen=True)
class IndependentOptions(Section):
    """Several trainings side by side that exchange no gradients."""

    parallel_independent: bool = option(
        False,
        "Several complete trainings side by side, one on each of --cuda-ids: each on its own share "
        "of the samples, or with its own --vary.",
    )
    cuda_ids: str | None = option(
        None, "Devices of --parallel-independent, such as 0,1; on a CPU, names of slots."
    )
    vary: str | None = option(
        None,
        "Settings that differ between runs, which then all see all samples: lr=1e-4,3e-4; several "
        "separated by `;` give all combinations.",
    )
    max_restarts: int = option(
        3,
        "How often a crashed run is restarted from its checkpoint.",
        minimum=0,
        only_with="parallel_independent",
    )
    shard: str | None = option(
        None,
        "Train on a share I/N: every N-th sample of the global order, from the I-th (0 to N-1).",
    )

    def _check_rules(self) -> None:
        super()._check_rules()
        parse_shard(self.shard)
        for name in ("cuda_ids", "vary"):
            if getattr(self, name) is not None and not self.parallel_independent:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is for independent runs; give "
                    "parallel_independent too, or leave it out"
                )
        if self.parallel_independent and self.shard is not None:
            raise ConfigError(
                f"shard={self.shard} is one share, and parallel_independent trains them all; give "
                "one of them"
            )
