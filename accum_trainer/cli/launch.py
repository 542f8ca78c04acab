"""`accum-trainer launch`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from accum_trainer.cli.completion import train_arguments
from accum_trainer.cli.file_completion import path_argument
from accum_trainer.cli.options import BeforeTrainArguments, is_on_command_line
from accum_trainer.cli.train import options_in, parse
from accum_trainer.config.sources import read_yaml
from accum_trainer.errors import AccumTrainerError, ConfigError
from accum_trainer.launch.node_ending import note_ending
from accum_trainer.launch.signals import STOPPED_AND_SAVED
from accum_trainer.train.run_folder import LOGS

if TYPE_CHECKING:
    from accum_trainer.launch.launch_file import LaunchFile
    from accum_trainer.launch.placement import NodePlacement

# Until the processes of a node that was slow to fail run again.
_STARTING_SEC = 600.0


@click.command(
    "launch",
    cls=BeforeTrainArguments,
    epilog="Example: accum-trainer launch launch_configs/cpu_2proc.yaml -- --batch-size 4 "
    "--global-batch-size 32 --steps 100",
)
@path_argument("config", metavar="CONFIG")
@click.option(
    "--machine-rank",
    type=int,
    envvar="SLURM_NODEID",
    metavar="N",
    help="This node's number, from 0, if CONFIG has several nodes.  [default: SLURM_NODEID]",
)
@click.option(
    "--main-process-ip",
    envvar="MASTER_ADDR",
    metavar="HOST",
    help="The first node.  [default: MASTER_ADDR]",
)
@click.option(
    "--main-process-port",
    envvar="MASTER_PORT",
    type=int,
    metavar="PORT",
    help="The processes' rendezvous port.  [default: MASTER_PORT; on one node a free port]",
)
@click.option(
    "--batch-start",
    metavar="TEXT",
    help="For batch scripts: names this start of the job. How this node ended is then noted in the "
    "run directory for `requeue`, and status 75 becomes 0: no other node is killed while it saves.",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="After a failure (a process was killed, or a status other than 0, 2 and 75) start all "
    "processes again from the newest checkpoint, at most N times in a row without a new one; "
    "torchrun's option of this name counts all restarts. With several nodes give it to each; node "
    "0 decides.",
)
@train_arguments
def command(
    config: str,
    machine_rank: int | None,
    main_process_ip: str | None,
    main_process_port: int | None,
    batch_start: str | None,
    max_restarts: int,
    train: tuple[str, ...],
) -> None:
    """Start `train` under CONFIG, written by `accum-trainer config create`, or any accelerate
    configuration.

    Arguments after `--` go to `train`. The output of rank 0 is shown here, each process writes its
    own log into the run directory's logs/, and a failure is shown in the words of the process that
    failed. Ctrl-C lets the training save and stop; the same command with the same --output-dir
    continues it. If CONFIG has several nodes, run it on each.
    """
    place = (machine_rank, main_process_ip, main_process_port)
    if batch_start is None:
        sys.exit(_launch(config, *place, max_restarts, train))
    # Not composed: what is wrong on this node alone must be noted, too.
    folder = options_in(train).get("output_dir")
    if folder is None:
        raise ConfigError(
            f"batch_start={batch_start} is noted in the run directory; give its --output-dir after "
            "--"
        )
    status = 1
    try:
        status = _launch(config, *place, max_restarts, train)
    except AccumTrainerError as error:
        status = error.exit_status
        raise
    finally:
        note_ending(Path(folder) / LOGS, batch_start, machine_rank or 0, status)
    sys.exit(0 if status == STOPPED_AND_SAVED else status)


def _launch(
    config: str,
    machine_rank: int | None,
    main_process_ip: str | None,
    main_process_port: int | None,
    max_restarts: int,
    train: tuple[str, ...],
) -> int:
    """Launch this node's processes; returns the exit status."""
    path = Path(config)
    if _is_independent(path):
        from accum_trainer.cli import main

        more = ["--max-restarts", str(max_restarts)] if max_restarts else []
        main(["train", "--config", config, *more, *train])
    composed = parse(train).config
    if composed.parallel_independent:
        raise ConfigError(
            f"parallel_independent starts single processes, but {config} launches processes that "
            "share a gradient; use `accum-trainer train --parallel-independent`, or a file of "
            "`accum-trainer config create parallel-independent`"
        )
    # accelerate and torch take seconds to import: only now that the options are known to be right.
    from accum_trainer.launch.launch_file import read_launch_file
    from accum_trainer.launch.restarting import Restarting
    from accum_trainer.launch.run import launch
    from accum_trainer.launch.starting_together import StartingTogether
    from accum_trainer.runs.restarts import Restarts
    from accum_trainer.train.run_folder import check_output_dir, new_run_folder

    file = read_launch_file(path, composed.cpu)
    if file.num_machines > 1 and composed.output_dir is None:
        raise ConfigError(
            f"{config} has {file.num_machines} nodes, which must agree on one --output-dir; "
            "give it after --"
        )
    if max_restarts and file.num_machines > 1:
        _check_restarts(file.num_machines, composed.resume, max_restarts)
    placement = _placement(config, file, machine_rank, main_process_ip, main_process_port)
    placement.check(may_restart=max_restarts > 0)
    folder = Path(composed.output_dir) if composed.output_dir else new_run_folder(composed.model)
    check_output_dir(folder, composed.resume)
    arguments = [*train, *([] if composed.output_dir else ["--output-dir", str(folder)])]
    if placement.machine_rank > 0:
        click.echo(
            f"node {placement.machine_rank} of {placement.num_machines}: {file.processes_here} "
            f"processes, logs in {folder / LOGS}",
            err=True,
        )
    start = functools.partial(
        launch, path, placement, arguments, folder / LOGS, file.deepspeed_file
    )
    restarting = Restarting()
    if max_restarts:
        restarting = Restarts(folder, arguments, composed.resume, max_restarts)
    if placement.num_machines == 1:
        return start(restarting=restarting)
    together = StartingTogether(
        folder / LOGS, placement, arguments, restarting, starts_again=max_restarts > 0
    )
    status = 1
    try:
        # A process that hangs keeps its node until its timeout.
        status = start(restarting=together, meeting_sec=composed.timeout + _STARTING_SEC)
    except AccumTrainerError as error:
        status = error.exit_status
        raise
    except KeyboardInterrupt:
        status = 130
        raise
    finally:
        together.end(status)
    return status


def _check_restarts(nodes: int, resume: str, max_restarts: int) -> None:
    """Raise a ConfigError unless several nodes can start again together."""
    if resume != "auto":
        raise ConfigError(
            f"max_restarts={max_restarts} on {nodes} nodes continues a run, and resume={resume} "
            "does not: the nodes would not agree at a restart on what was already written. Leave "
            "--resume out, with a new --output-dir for a new run"
        )


def _placement(
    config: str,
    file: LaunchFile,
    machine_rank: int | None,
    main_process_ip: str | None,
    main_process_port: int | None,
) -> NodePlacement:
    """This node's place among the nodes of `file`.

    On one node, the environment's SLURM_NODEID and MASTER_PORT do not count: they describe a
    cluster.
    """
    from accum_trainer.launch.placement import NodePlacement

    if file.num_machines > 1:
        placement = NodePlacement(
            machine_rank or 0, file.num_machines, main_process_ip, main_process_port
        )
        if machine_rank is None:
            raise ConfigError(
                f"{config} has {file.num_machines} nodes; say which one this is with --machine-rank"
            )
    else:
        if machine_rank and is_on_command_line("machine_rank"):
            raise ConfigError(
                f"machine_rank={machine_rank}, but {config} has one node; leave --machine-rank out"
            )
        if not is_on_command_line("main_process_port"):
            main_process_port = file.main_process_port
        placement = NodePlacement(main_process_port=main_process_port or None)
    return placement


def _is_independent(path: Path) -> bool:
    """Whether the file holds options of `train` for independent runs, rather than an accelerate
    configuration."""
    content = read_yaml(path, "launch configuration")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a launch configuration")
    if "parallel_independent" in content:
        return True
    if "distributed_type" not in content:
        raise ConfigError(
            f"{path} is no launch configuration: it has no distributed_type (accelerate) and no "
            "parallel_independent; `accum-trainer config create` writes one, and `accum-trainer "
            "train --config` takes options of `train`"
        )
    return False
