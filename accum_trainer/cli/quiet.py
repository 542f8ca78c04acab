"""Keep other libraries' notices that ask nothing of the user out of the command line's output.

Each is named by its text, so anything else that a library says still shows. Imports none of them:
their loggers, warnings and variables are known by name.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Logger -> how its notices begin.
_LOGGED = {
    "DeepSpeed": "Setting accelerator to CPU",  # on every import without a GPU, ZeRO or not
    "transformers.modeling_utils": "`loss_type=None` was set",  # the objective is proven
}
# Old names that peft, DeepSpeed or older versions of transformers need.
_DEPRECATED = (
    "`is_gradient_checkpointing` is deprecated",
    "`gradient_checkpointing_enable` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
)
_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def quiet_libraries() -> None:
    """Drop the notices above, and progress bars in a file or from a second process."""
    for name, beginning in _LOGGED.items():
        logging.getLogger(name).addFilter(_Without(beginning))
    for message in _DEPRECATED:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        for variable in _BARS:  # transformers follows the hub's
            os.environ.setdefault(variable, "1")


def open_missing_streams() -> None:
    """Open a standard stream that was closed, as after `2>&-`, on the null device: the next file to
    be opened would have its number, and what a library writes to it would go into that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        stream = open(os.devnull, "w" if number else "r")  # noqa: SIM115
        try:
            os.fstat(number)
        except OSError:
            os.dup2(stream.fileno(), number, inheritable=True)
        setattr(sys, name, stream)


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)
