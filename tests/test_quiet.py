"""The command line drops other libraries' notices that ask nothing of the user, and no others."""

from __future__ import annotations

import sys

from tests.launching import run

PROGRAM = """
import logging, os, warnings
from accum_trainer.cli.quiet import quiet_libraries
quiet_libraries()
logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU ...")
logging.getLogger("DeepSpeed").warning("the disk is full")
models = logging.getLogger("transformers.modeling_utils")
models.warning("`loss_type=None` was set in the config but it is unrecognized.")
models.warning("some weights were not used")
warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning)
warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. ", FutureWarning)
warnings.warn("`something` is deprecated", FutureWarning)
print(*(os.environ.get(f"HF_{of}_DISABLE_PROGRESS_BARS") for of in ("HUB", "DATASETS")))
"""


def test_named_notices_are_dropped_and_others_stay():
    """Also no progress bars, which would fill a file."""
    ended = run([sys.executable, "-c", PROGRAM])
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stderr.splitlines() if "warnings.warn(" not in line]
    assert said[:2] == ["the disk is full", "some weights were not used"]
    assert len(said) == 3 and "`something` is deprecated" in said[2]
    assert ended.stdout == "1 1\n"


def test_bars_that_the_user_asks_for_stay():
    ended = run([sys.executable, "-c", PROGRAM], HF_HUB_DISABLE_PROGRESS_BARS="0")
    assert ended.stdout == "0 1\n"
