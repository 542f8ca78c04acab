"""Settings of FSDP in accelerate's plugin and launcher: one that this project's engine has under
another name, and those that it lacks and that would be lost.

Knows accelerate's names of them; no engine.
"""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.fsdp import CPUOffloadPolicy

from accum_trainer.engine.request import Request, is_true
from accum_trainer.errors import EngineError


def refuse_lost_settings(plugin: Any) -> None:
    """Raise an EngineError if the user's plugin, or else the launcher's variables, ask for what
    would be lost.

    `reshard_after_forward` is none: when weights are gathered changes no update (`weight_sync`).
    """
    if plugin is not None:
        version = int(plugin.fsdp_version)
        checkpointing = bool(plugin.activation_checkpointing)
        strategy = str(plugin.sharding_strategy)
    else:
        # `fsdp=True` sets no variable; accelerate's launcher always sets the version.
        version = int(os.environ.get("FSDP_VERSION", "2"))
        checkpointing = is_true(os.environ.get("FSDP_ACTIVATION_CHECKPOINTING"))
        strategy = os.environ.get("FSDP_SHARDING_STRATEGY", "")
    if version != 2:
        raise EngineError(
            f"fsdp_version={version} is asked for; only FSDP2 is available: set fsdp_version: 2"
        )
    if checkpointing:
        raise EngineError(
            "fsdp_activation_checkpointing is not available; leave it out, and give "
            "gradient_checkpointing to train, or call model.gradient_checkpointing_enable()"
        )
    if "HYBRID" in strategy.upper():
        raise EngineError(
            f"fsdp_sharding_strategy={strategy} is of FSDP1, and FSDP2 would ignore it; leave it "
            "out, and give shard_size, the processes of a group that shards the model"
        )


def offloads(request: Request) -> bool:
    """Whether shards are to lie in host memory: by `cpu_offload`, or in the words of accelerate."""
    plugin = request.accelerator_kwargs.get("fsdp_plugin")
    if plugin is not None:
        theirs = isinstance(plugin.cpu_offload, CPUOffloadPolicy)  # "no" is its base class
    else:
        theirs = request.names("fsdp") and is_true(os.environ.get("FSDP_OFFLOAD_PARAMS"))
    return theirs or bool(request.options.get("cpu_offload"))
