"""The section Output: the run directory and its contents."""

import difflib
from dataclasses import dataclass

from accum_trainer.config.option import Section, option
from accum_trainer.errors import ConfigError

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


@dataclass(frozen=True)
class OutputOptions(Section):
    """Run directory, records, checkpoints, saved weights."""

    output_dir: str | None = option(
        None, "The run directory. Default: runs/<model>-<date>-<time>.", may_be_path=True
    )
    log_file: str | None = option(
        None, "A second file for the records, besides metrics.jsonl.", may_be_path=True
    )
    report_to: str = option(
        "none",
        f"Also send records to trackers, separated by commas: {', '.join(TRACKERS)}.",
    )
    report_project: str = option(
        "accum-trainer",
        "The project of the runs that trackers show.",
        only_with="report_to",
    )
    log_every: int | None = option(
        None,
        "Updates between two lines of progress where there is no terminal. Default: about ten "
        "lines in all.",
        minimum=1,
    )
    checkpoint_every: int = option(
        500, "Updates between checkpoints (one is always written at the end).", minimum=1
    )
    checkpoint_minutes: float = option(
        30.0, "Minutes after which a checkpoint is written before that many updates.", above=0
    )
    keep_checkpoints: int = option(2, "Newest checkpoints to keep.", minimum=1)
    keep_best: bool = option(
        False,
        "Also write and keep the checkpoint with the lowest evaluation loss (--eval-every).",
    )
    resume: str = option(
        "auto",
        "auto: continue the run in the run directory; never: refuse to; anew: replace it; or a "
        "checkpoint's PATH.",
        may_be_path=True,
    )
    branch_from: str | None = option(
        None,
        "Begin a new run from the weights, optimizer state and place in the data of another run's "
        "checkpoint (a PATH), with its own effective batch and schedule.",
        may_be_path=True,
    )
    save_dtype: str = option(
        "auto",
        "The dtype of the weights in model/. auto: that of the model's own checkpoint, or float32 "
        "with --shard, whose result is to be merged. Checkpoints of the run are float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    dry_run: bool = option(False, "Check everything, print the plan, train nothing, write nothing.")

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.branch_from is not None and self.resume not in ("auto", "never", "anew"):
            raise ConfigError(
                f"resume={self.resume} continues a run and branch_from={self.branch_from} begins "
                "one; give one of them"
            )
        for name in self.trackers:
            if name not in TRACKERS:
                near = difflib.get_close_matches(name[:100], TRACKERS, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ConfigError(
                    f"report_to={self.report_to[:100]}: {name[:100] or 'nothing'} is no tracker; "
                    f"give one or several of {', '.join(TRACKERS)}, separated by commas, or none"
                    f"{hint}"
                )
        if not self.report_project.strip():
            raise ConfigError("report_project is empty; give the name of a project")

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers that records are sent to, each once."""
        if self.report_to == "none":
            return ()
        return tuple(dict.fromkeys(name.strip() for name in self.report_to.split(",")))
