"""The section Data: rows to train on and rows to evaluate on."""

from dataclasses import dataclass

from accum_trainer.config.option import Section, option
from accum_trainer.errors import ConfigError


@dataclass(frozen=True)
class DataOptions(Section):
    """Sources of rows, their columns, and when to evaluate."""

    dataset_file: str | None = option(
        None,
        "Training rows: .txt .jsonl .json .csv .parquet. Default: the embedded corpus.",
        may_be_path=True,
    )
    dataset: str | None = option(None, "Training rows from the hub: an id, or id:config.")
    prompt_column: str | None = option(
        None,
        "The column that holds the prompt, with --completion-column; evaluation rows use it too.",
    )
    completion_column: str | None = option(
        None, "The column that is trained on, with --prompt-column."
    )
    text_column: str | None = option(None, "The column of texts that are trained on whole.")
    chat_template: str | None = option(
        None,
        "A Jinja file: the chat template for messages and conversations, instead of the "
        "tokenizer's.",
        may_be_path=True,
    )
    on_bad_row: str = option(
        "error",
        "A row that cannot be read or trained on: end with an error, or skip it and count it.",
        choices=("error", "skip"),
    )
    eval_file: str | None = option(
        None,
        "Rows for evaluation, in the same formats; at the end, or with --eval-every.",
        may_be_path=True,
    )
    eval_every: int | None = option(
        None, "Evaluate after every N updates (and at the end).", minimum=1
    )

    def _check_rules(self) -> None:
        super()._check_rules()
        if self.dataset_file is not None and self.dataset is not None:
            raise ConfigError(
                f"dataset_file={self.dataset_file} and dataset={self.dataset} both name the "
                "training data; give one of them"
            )
        self._check_columns()
        if (
            self.eval_every is not None
            and self.eval_file is None
            and (self.dataset_file or self.dataset)
        ):
            raise ConfigError(
                f"eval_every={self.eval_every} needs eval_file, the rows to evaluate on "
                "(only the embedded corpus holds out rows for evaluation)"
            )

    def _check_columns(self) -> None:
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ConfigError(
                f"prompt_column={self.prompt_column} and "
                f"completion_column={self.completion_column} belong together; "
                "give both (or text_column, for texts that are trained on whole)"
            )
        if self.prompt_column is not None and self.text_column is not None:
            raise ConfigError(
                f"prompt_column={self.prompt_column} and text_column={self.text_column} both say "
                "which text to train on; give one of them"
            )
        if self.prompt_column is not None and self.prompt_column == self.completion_column:
            raise ConfigError(
                f"prompt_column and completion_column are both {self.prompt_column}; give two "
                "columns"
            )
        named = [n for n in ("prompt_column", "text_column") if getattr(self, n) is not None]
        if named and not (self.dataset_file or self.dataset or self.eval_file):
            raise ConfigError(
                f"{named[0]}={getattr(self, named[0])} has no effect without data of yours; give "
                f"dataset_file or dataset too, or leave {named[0]} out"
            )
