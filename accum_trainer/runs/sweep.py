"""A sweep over effective batches: branches of one run, on the same samples, one after another.

    DIR/
      sweep.json           what is compared
      verdict.json         the comparison, once all branches are done
      from/step-N/         the checkpoint that they branch from, kept while RUN goes on
      b-16/, b-32/, ...    a run directory each
      logs/, independent.json, summary.json, loss.png    as of independent runs

Branched training, after Merrill et al. 2025, arXiv:2505.23971: each branch has its own effective
batch and learning rate, and all train on the same number of samples. `sweep_verdict` compares
them; `independent` runs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accum_trainer.batch_plan import scale_lr
from accum_trainer.config import TrainConfig
from accum_trainer.errors import CheckpointError, ConfigError
from accum_trainer.launch.folders import make_folder
from accum_trainer.runs.independent_run import IndependentRun
from accum_trainer.runs.json_file import read_json
from accum_trainer.runs.sweep_verdict import Verdict, judge
from accum_trainer.train import run_folder as files
from accum_trainer.train.checkpoint import check_manifest, read_state
from accum_trainer.train.checkpoint_folder import find_checkpoint
from accum_trainer.train.model_origin import identity_of
from accum_trainer.train.records import read_records

SWEEP, VERDICT, ORIGIN = "sweep.json", "verdict.json", "from"
# Updates of the largest batch, if the samples are not given.
_UPDATES = 64
# A rate below this part of the run's peak: its schedule has ended.
_ENDED = 0.01


@dataclass(frozen=True)
class Sweep:
    """The branches to compare.

    Attributes:
        folder: of the sweep.
        run: that the branches leave.
        checkpoint: that the branches begin from.
        base_batch_size: the run's own effective batch.
        lr: the learning rate at that batch.
        lr_scaling: how it follows the batch.
        branches: effective batch -> the configuration of its run, smallest batch first.
        samples: that each branch trains on.
    """

    folder: Path
    run: Path
    checkpoint: Path
    base_batch_size: int
    lr: float
    lr_scaling: str
    branches: dict[int, TrainConfig]
    samples: int

    def as_json(self) -> dict[str, Any]:
        """All that decides the branches; the same command must give the same."""
        return {
            "run": str(self.run),
            "checkpoint": identity_of(self.checkpoint),
            "base_batch_size": self.base_batch_size,
            "lr": self.lr,
            "lr_scaling": self.lr_scaling,
            "samples": self.samples,
            "branches": {str(size): config.lr for size, config in self.branches.items()},
        }

    def folders(self) -> list[tuple[int, Path]]:
        """Effective batch and run directory of each branch."""
        return [(size, self.folder / name_of(size)) for size in self.branches]

    def runs(self) -> list[IndependentRun]:
        """The branches as runs, in their folders."""
        return [
            IndependentRun(
                name_of(size),
                {"global_batch_size": str(size), "lr": f"{config.lr:g}"},
                config,
                folder,
                self.folder / files.LOGS / f"{name_of(size)}.log",
            )
            for (size, folder), config in zip(self.folders(), self.branches.values(), strict=True)
        ]


def name_of(size: int) -> str:
    return f"b-{size}"


def plan_sweep(
    source: Path,
    sizes: list[int],
    *,
    output: Path | None = None,
    samples: int | None = None,
    lr: float | None = None,
    lr_scaling: str = "sqrt",
    trust_remote_code: bool = False,
) -> Sweep:
    """The sweep over `sizes` from the checkpoint that `source` names. Writes nothing.

    Args:
        source: a run directory, whose newest whole checkpoint is taken, or a checkpoint in one.
        sizes: effective batches.
        output: the sweep's folder; default: beside the run.
        samples: for each branch; rounded up so that all branches end at the same sample. Default:
            64 updates of the largest batch.
        lr: at the run's own effective batch; default: its learning rate at the checkpoint.
        lr_scaling: `none`, `sqrt` or `linear` in the effective batch (`batch_plan.scale_lr`).

    Raises:
        CheckpointError, ConfigError: there is no whole checkpoint in a run directory; sizes that
            cannot be compared; the run's schedule has ended; the folder holds something else.
    """
    is_run = (source / files.CHECKPOINTS).is_dir()
    run = source.absolute() if is_run else source.absolute().parent.parent
    folder = output or run.parent / f"{run.name}-sweep"
    checkpoint = _checkpoint_of(source, run, is_run, folder)
    if not (run / files.CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint} lies in no run directory ({run / files.CONFIG} is missing), so what it "
            "trains on is not known; name a run or a checkpoint in it"
        )
    if len(set(sizes)) < 2 or min(sizes) < 1:
        raise ConfigError(
            f"global_batch_size={','.join(map(str, sizes))}: a sweep compares two or more "
            "different effective batches of at least 1 sample, such as 16,32,64"
        )
    sizes = sorted(set(sizes))
    state = read_state(checkpoint)
    base = int(state["identity"]["global_batch_size"])
    rate = _rate(state, checkpoint) if lr is None else lr
    config = TrainConfig.from_yaml(run / files.CONFIG, trust_remote_code=trust_remote_code)
    length = _samples_per_epoch(run)
    position = (length, int(state["windows"]["samples_consumed"]))
    wanted = samples if samples is not None else _UPDATES * sizes[-1]
    total = common_end(wanted, sizes, *position)
    _check_folder(folder)
    branches = {
        size: dataclasses.replace(
            config,
            output_dir=str(folder / name_of(size)),
            branch_from=str((folder / ORIGIN / checkpoint.name).absolute()),
            global_batch_size=size,
            gradient_accumulation_steps=None,
            batch_size=min(config.batch_size, size)
            if isinstance(config.batch_size, int)
            else config.batch_size,
            steps=updates_of(total, size, *position),
            epochs=None,
            lr=scale_lr(rate, lr_scaling, size, base),
            lr_scaling="none",
            lr_base_batch_size=None,
            scheduler="constant",
            warmup="0",
            resume="auto",
            log_file=None,
            report_to="none",
            keep_best=False,
            eval_every=None,
            noise_every=0,
            max_hours=None,
            merge_adapter=False,
            checkpoint_every=10**9,
            keep_checkpoints=1,
            rank_weights=None,
        )
        for size in sizes
    }
    return Sweep(folder, run, checkpoint, base, rate, lr_scaling, branches, total)


def _checkpoint_of(source: Path, run: Path, is_run: bool, folder: Path) -> Path:
    """The checkpoint that `source` names; if a sweep of the same run was begun in `folder`, the one
    that it kept. RUN may have deleted it since then, or have a newer one."""
    kept = _kept_in(folder, run)
    if kept is not None and not is_run and not source.exists() and kept.name == source.name:
        return kept
    found = find_checkpoint(str(source), None, option="from")
    if found is None:  # `never` or `anew`
        raise CheckpointError(f"from={source} is no folder; give a run directory")
    if kept is None or not is_run:
        return found
    # The run may have been started anew in its folder.
    now, then = read_state(found), read_state(kept)
    is_same = now["identity"] == then["identity"] and all(
        now["options"].get(key) == then["options"].get(key) for key in ("lr", "weight_decay")
    )
    return kept if is_same else found


def _kept_in(folder: Path, run: Path) -> Path | None:
    """The checkpoint that the sweep of `run` in `folder` began from, if there is such a sweep."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):
        held = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
        for path in (folder / ORIGIN).iterdir() if held["run"] == str(run) else ():
            if identity_of(path) == held["checkpoint"]:
                check_manifest(path)
                return path
    return None


def _rate(state: dict[str, Any], checkpoint: Path) -> float:
    """The learning rate of the update after the checkpoint."""
    group = state["optimizer_groups"][0]
    rate, peak = float(group["lr"]), float(group.get("initial_lr", group["lr"]))
    if rate < _ENDED * peak:
        raise ConfigError(
            f"the learning rate of {checkpoint} is {rate:g}, of a peak of {peak:g}: the run's "
            "schedule has ended, so nothing would be learnt from there; name an earlier checkpoint "
            f"(--from {checkpoint.parent}/step-N), or give the rate to train with (--lr)"
        )
    return rate


def _samples_per_epoch(run: Path) -> int:
    try:
        return int(json.loads((run / files.PLAN).read_text(encoding="utf-8"))["num_samples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{run / files.PLAN} cannot be read ({error}), so the length of an epoch is not known"
        ) from None


def common_end(wanted: int, sizes: list[int], length: int, consumed: int) -> int:
    """The fewest samples, at least `wanted`, after which all sizes have ended a window together."""
    step, rest = math.lcm(*sizes), length - consumed
    found = -(-wanted // step) * step
    if found <= rest:
        return found
    return rest + max(0, -(-(wanted - rest) // length)) * length


def updates_of(total: int, size: int, length: int, consumed: int) -> int:
    """Windows of `size` in `total` samples, after `consumed` of an epoch of `length`; the last of
    each epoch may be short."""
    rest = length - consumed
    if total <= rest:
        return -(-total // size)
    return -(-rest // size) + (total - rest) // length * -(-length // size)


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and not (folder / SWEEP).is_file() and not _is_unbegun(folder):
        raise ConfigError(
            f"output={folder} holds other files and no sweep; name a new or empty folder"
        )
    files.check_writable("output", folder)


def _is_unbegun(folder: Path) -> bool:
    """Whether a folder is empty, or a sweep was killed there while it copied its checkpoint."""
    if {path.name for path in folder.iterdir()} - {ORIGIN}:
        return False
    kept = folder.glob(f"{ORIGIN}/*")
    return all(path.name.startswith(("step-", ".step-")) for path in kept)


def conclude(sweep: Sweep, tolerance: float) -> Verdict | None:
    """Compare the branches, which are done, and write verdict.json; None if they have too few
    updates to be compared."""
    records = {size: read_records(folder / files.METRICS) for size, folder in sweep.folders()}
    verdict = judge(records, list(sweep.branches), tolerance)
    if verdict is not None:
        files.write_json(sweep.folder / VERDICT, dataclasses.asdict(verdict))
    return verdict


def begin(sweep: Sweep) -> None:
    """Make the sweep's folder, or check that the one there is of the same sweep.

    Raises:
        CheckpointError: its sweep.json is damaged.
        ConfigError: it is of another.
    """
    path, now = sweep.folder / SWEEP, sweep.as_json()
    if path.is_file():
        try:
            held = read_json(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; name another output") from None
        differing = [key for key in now if held.get(key) != now[key]]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"output={sweep.folder} holds a sweep with {key}={held.get(key)}, and "
                f"{key}={now[key]} is asked for now; give the same again to continue it, or "
                "another output"
            )
    make_folder(sweep.folder)
    kept = sweep.folder / ORIGIN / sweep.checkpoint.name
    if not path.is_file() and kept.is_dir():
        shutil.rmtree(kept)  # of a sweep that was killed while it began, maybe of another run
    if not kept.is_dir():
        partial = kept.with_name(f".{kept.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        # Linked where the file system can: RUN may delete its checkpoint meanwhile.
        shutil.copytree(sweep.checkpoint, partial, copy_function=_link_or_copy)
        partial.rename(kept)
    if not path.is_file():
        files.write_json(path, now)


def remove_beginning(sweep: Sweep) -> None:
    """Undo `begin`, after every branch was refused before it began."""
    shutil.rmtree(sweep.folder / ORIGIN, ignore_errors=True)
    (sweep.folder / SWEEP).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it
        sweep.folder.rmdir()


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
