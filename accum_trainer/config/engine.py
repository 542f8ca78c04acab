"""The sections Engine and Independent runs: where a run trains, and beside which others."""

from dataclasses import dataclass

from accum_trainer.batch_plan import parse_shard
from accum_trainer.config.option import Section, option
from accum_trainer.errors import ConfigError

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class EngineOptions(Section):
    """The device, and what is sharded by which library.

    `zero_stage` is another way to write `engine`: if one of them names a ZeRO stage, both do.
    """

    cpu: bool = option(False, "Train on the CPU even if there is a GPU.")
    engine: str | None = option(
        None,
        "The engine that must be in force, or the run ends before it begins. Default: what the "
        "launcher says, else DDP, or single in one process.",
        choices=ENGINES,
    )
    zero_stage: str = option(
        "none",
        "Shard with DeepSpeed ZeRO: another way to write --engine zero1 to zero3.",
        choices=("none", "zero1", "zero2", "zero3"),
        aliases={"1": "zero1", "2": "zero2", "3": "zero3"},  # as `Accumulator(zero_stage=2)`
    )
    cpu_offload: bool = option(
        False,
        "Keep the optimizer's state in host memory (ZeRO), and under FSDP2 weights and gradients "
        "too; the optimizer steps there.",
    )
    shard_size: int | None = option(
        None,
        "FSDP2: shard the model over groups of so many processes, those of a machine, that hold "
        "copies of each other and exchange gradients once per window. Default: over all.",
        minimum=2,
    )
    peak_tflops: float | None = option(
        None,
        "What one device could do at most, in 10^12 operations per second, for `mfu` in the "
        "records. Default: its maker's figure, if it is known.",
        above=0,
    )

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.zero_stage != "none":
            if self.engine not in (None, self.zero_stage):
                raise ConfigError(
                    f"engine={self.engine} and zero_stage={self.zero_stage} name two engines; give "
                    "one of them"
                )
            self._set("engine", self.zero_stage)
        elif self.engine is not None and self.engine.startswith("zero"):
            self._set("zero_stage", self.engine)
        if self.shard_size is not None:
            if self.engine not in (None, "fsdp2"):
                raise ConfigError(
                    f"shard_size={self.shard_size} is for FSDP2, but engine={self.engine}; give "
                    "engine=fsdp2, or leave shard_size out"
                )
            self._set("engine", "fsdp2")
        if self.cpu_offload and self.zero_stage == "none" and self.engine != "fsdp2":
            other = f"engine={self.engine} shards none" if self.engine else "no engine is named"
            raise ConfigError(
                f"cpu_offload keeps sharded state in host memory, but {other}; give engine (zero1 "
                "to zero3, fsdp2), or leave cpu_offload out"
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
