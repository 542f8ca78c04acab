"""Which independent runs --vary and --cuda-ids ask for, and on which devices. Arithmetic on texts;
imports no torch."""

from __future__ import annotations

from accum_trainer.errors import ConfigError
from accum_trainer.launch.spec import combinations

# Options that all runs share, or that the launcher sets for each.
_NOT_VARIED = {
    *("output_dir", "log_file", "resume", "dry_run", "shard", "max_restarts", "cpu"),
    "trust_remote_code",
    *("parallel_independent", "cuda_ids", "vary"),
}


def settings_of(vary: str | None, num_devices: int) -> list[dict[str, str]]:
    """The options of each run: the combinations of `vary`, or a shard per device.

    Raises:
        ConfigError: `vary` is not `option=value,value`, or names an option that all runs share.
    """
    if vary is None:
        return [{"shard": f"{i}/{num_devices}"} for i in range(num_devices)]
    settings = [dict(text.split("=", 1) for text in run) for run in combinations(vary)]
    for name in settings[0]:
        if name in _NOT_VARIED:
            raise ConfigError(f"vary={vary}: {name} cannot differ between the runs")
    return settings


def devices_of(text: str | None, gpus: int | None) -> list[str]:
    """The devices of `cuda_ids`, or all; `gpus` is None on a CPU.

    Raises:
        ConfigError: `cuda_ids` is no list of devices that there are, or is missing on a CPU.
    """
    if text is None:
        if gpus is None:
            raise ConfigError(
                "parallel_independent on a CPU needs cuda_ids, the names of its slots, such as 0,1"
            )
        return [str(i) for i in range(gpus)]
    devices = [device.strip() for device in text.split(",")]
    if not all(device.isdecimal() for device in devices):
        raise ConfigError(f"cuda_ids={text} is not a list of device numbers, such as 0,1")
    if len(set(devices)) < len(devices):
        raise ConfigError(f"cuda_ids={text} names a device twice; each run needs its own")
    if gpus is not None and any(int(device) >= gpus for device in devices):
        raise ConfigError(f"cuda_ids={text}, but this machine has {gpus} GPUs, 0 to {gpus - 1}")
    return devices
