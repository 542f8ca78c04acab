"""One update of many kinds of models against one big batch in float64: exact, or refused.

    python -m benchmarks.families [--only NAME ...] [--out FILE.md] (about 4 minutes on 2 cores)

Each model of `families_models.py` goes through four loops, in one process and in two under DDP over
gloo, with B = 2 and an effective batch of 8 over 11 ragged rows: a whole window and a tail of
three.

    own mean     `acc.batches(loader)` and `model(**batch).loss`, as in the README
    our loss     `acc.windows(rows)` and `causal_lm_loss`
    DataLoader   `acc.windows(loader)`, shuffled, and `model(**batch).loss`
    packed       `acc.windows(rows, collate_fn=PackingCollator())` and `causal_lm_loss`

A figure is the norm of the difference between the gradient that the optimizer steps with and that
of one float64 batch of the window's rows, under the model's own loss, relative to the norm of the
latter; a router's loss is its mean over the micro-batches as they were run. The worst window and
process counts. The bound is 2e-6, or 1.1 times the error that one float32 batch of the same rows
has itself if that is more (a CTC loss). A loop that is refused shows why. Anything else is a fault.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from accum_trainer import AccumTrainerError, Accumulator, causal_lm_loss
from accum_trainer.sources.collating import PackingCollator
from accum_trainer.verify.big_batch import dropout_off, relative_error
from benchmarks.families_models import FAMILIES, Family

LOOPS = ("own mean", "our loss", "DataLoader", "packed")
WORLD_SIZES = (1, 2)
BOUND = 2e-6
B, EFFECTIVE, ROWS = 2, 8, 11
TIMEOUT_SEC, LONGEST_WAIT_SEC = 1200, 60


@dataclass(frozen=True)
class Cell:
    """What one loop did on one model: the worst error, or why it was refused, or how it failed.

    Attributes:
        float32_error: of one big float32 batch of the same rows.
    """

    family: str
    kind: str
    loop: str
    world_size: int
    error: float | None = None
    float32_error: float = 0.0
    refused: str = ""
    failed: str = ""

    @property
    def is_good(self) -> bool:
        if self.refused or self.failed:
            return not self.failed
        return self.error is not None and self.error <= max(BOUND, 1.1 * self.float32_error)

    def text(self) -> str:
        if self.failed:
            return "FAILED"
        if self.refused:
            return "refused"
        assert self.error is not None
        return f"{self.error:.0e}" if self.is_good else f"**{self.error:.1e}**"


# --- in the processes that train ---


class Trial:
    """One model in one loop; its weights stay as they are, so each window has the same truth."""

    def __init__(self, family: Family) -> None:
        self.acc = Accumulator(micro_batch_size=B, global_batch_size=EFFECTIVE, cpu=True)
        self.family, self.rows = family, family.rows(ROWS)
        plain = family.build().train()
        freeze_batch_norm(plain, family)
        self.exact, self.single = copy.deepcopy(plain).double(), copy.deepcopy(plain)
        names = {id(p): name for name, p in plain.named_parameters()}
        sgd = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.0)

        def note(*_: Any) -> None:
            parameters = [p for group in sgd.param_groups for p in group["params"]]
            self.found = {names[id(p)]: p.grad.clone() for p in parameters if p.grad is not None}

        sgd.register_step_pre_hook(note)
        self.found: dict[str, torch.Tensor] = {}
        self.ran: list[Any] = []
        self.model, self.optimizer = self.acc.prepare(plain, sgd)

    def errors(self, loop: str) -> Iterator[tuple[float, float]]:
        """The error of each window, and that of one float32 batch."""
        collate = PackingCollator() if loop == "packed" else self.family.collate
        rows = [_as_lists(row) for row in self.rows] if loop == "packed" else self.rows
        is_ours = loop in ("our loss", "packed")
        if loop == "own mean":
            loader = DataLoader(rows, batch_size=B, collate_fn=collate)
            updates = self.acc.num_updates
            for batch in self.acc.batches(loader):
                self._micro_batch(batch, is_ours)
                self.optimizer.step()
                if self.acc.num_updates > updates:
                    yield self._error(self.acc.num_updates - 1)
                updates = self.acc.num_updates
            return
        source = rows if is_ours else DataLoader(rows, batch_size=B, collate_fn=collate)
        options = {"collate_fn": collate, "shuffle": False} if is_ours else {}
        for index, window in enumerate(self.acc.windows(source, **options)):
            for batch in window:
                self._micro_batch(batch, is_ours)
            self.acc.step(self.optimizer)
            yield self._error(index)

    def _micro_batch(self, batch: Any, is_ours: bool) -> None:
        self.ran.append(batch)
        with self.acc.accumulate(self.model):
            self.acc.backward(
                causal_lm_loss(self.model, batch) if is_ours else self.model(**batch).loss
            )

    def _error(self, index: int) -> tuple[float, float]:
        window = self.family.collate(self.rows[index * EFFECTIVE : (index + 1) * EFFECTIVE])
        ran = [batch for rank in self.acc.engine.gather_objects(self.ran) for batch in rank]
        self.ran = []
        truth = one_big_batch(self.exact, _doubled(window), [_doubled(batch) for batch in ran])
        peer = one_big_batch(self.single, window, ran)
        return relative_error(self.found, truth), relative_error(peer, truth)


def one_big_batch(
    model: torch.nn.Module, window: dict[str, torch.Tensor], ran: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The gradient of the model's own loss, a router's part taken from the micro-batches that
    ran."""
    model.zero_grad()
    outputs = model(**window)
    coefficient = _router_coefficient(model)
    router = getattr(outputs, "aux_loss", None) if coefficient else None
    (outputs.loss if router is None else outputs.loss - coefficient * router).backward()
    if router is not None:
        for batch in ran:
            # With a cache samples in one row would see each other (docs/speed.md).
            options = {} if "attention_mask" in batch else {"use_cache": False}
            (coefficient * model(**batch, **options).aux_loss / len(ran)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def freeze_batch_norm(model: torch.nn.Module, family: Family) -> None:
    """As the refusal of BatchNorm advises, for the family that shows its remedy."""
    if "frozen" in family.name:
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - torch has no public name
                module.eval()


def _router_coefficient(model: torch.nn.Module) -> float:
    config = model.config
    on = getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", 0.0)) if on else 0.0


def _doubled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def _as_lists(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() for key, value in row.items()}


def attempt(family: Family, loop: str) -> dict[str, Any]:
    """One cell, on this process."""
    try:
        trial = Trial(family)
        with dropout_off(trial.exact), dropout_off(trial.single), dropout_off(trial.model):
            errors = list(trial.errors(loop))
        is_whole = len(errors) == -(-ROWS // EFFECTIVE)
        worst = dict(zip(("error", "float32_error"), max(errors), strict=True))
        return worst if is_whole else {"failed": f"{len(errors)} windows"}
    except AccumTrainerError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def work(out: str, cells: list[tuple[str, str, str]]) -> None:
    """Run cells, and write what came of them on this rank."""
    import transformers
    from accelerate.state import AcceleratorState, GradientState

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a rank that waits for another is a fault, soon
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=LONGEST_WAIT_SEC))
    found = []
    for kind, name, loop in cells:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        family = next(f for f in FAMILIES if (f.kind, f.name) == (kind, name))
        found.append(attempt(family, loop))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (Path(out) / f"rank{rank}.json").write_text(json.dumps(found))


# --- in the process that asks ---


def measure(cells: list[tuple[str, str, str]], world_size: int) -> list[Cell]:
    """Run (kind, family, loop) in so many real processes; the worst rank counts."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "cells.json"
        asked.write_text(json.dumps(cells))
        run = subprocess.run(
            [
                sys.executable,
                *(launcher if world_size > 1 else []),
                "-m",
                "benchmarks.families",
                "--work",
                folder,
            ],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SEC,
        )
        files = sorted(Path(folder).glob("rank*.json"))
        if run.returncode != 0 or len(files) != world_size:
            raise RuntimeError(run.stderr[-3000:])
        ranks = [json.loads(file.read_text()) for file in files]
    return [
        Cell(name, kind, loop, world_size, **_worst([rank[i] for rank in ranks]))
        for i, (kind, name, loop) in enumerate(cells)
    ]


def _worst(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    for key in ("failed", "refused"):
        found = [rank[key] for rank in ranks if key in rank]
        if found:
            all_alike = key == "failed" or len(found) == len(ranks)
            return (
                {key: found[0]}
                if all_alike
                else {"failed": f"refused on one rank only: {found[0]}"}
            )
    return max(ranks, key=lambda rank: rank["error"])


def cells_of(families: list[Family]) -> list[tuple[str, str, str]]:
    """Every loop that makes sense for each; packing is for rows of tokens alone."""
    return [
        (f.kind, f.name, loop)
        for f in families
        for loop in LOOPS
        if loop != "packed" or f.kind == "causal"
    ]


def table(cells: list[Cell]) -> str:
    """A row for each model, a column for each loop and W; then the refusals in their own words."""
    columns = [(loop, w) for loop in LOOPS for w in WORLD_SIZES]
    found = {(c.kind, c.family, c.loop, c.world_size): c for c in cells}
    lines = [
        "| kind | model | " + " | ".join(f"{loop}, W={w}" for loop, w in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for kind, family in dict.fromkeys((c.kind, c.family) for c in cells):
        row = [found.get((kind, family, loop, w)) for loop, w in columns]
        lines.append(
            f"| {kind} | {family} | " + " | ".join(c.text() if c else "" for c in row) + " |"
        )
    refusals = Counter(
        f"{c.kind}, {c.family}, {c.loop}: {c.refused or c.failed}"
        for c in cells
        if c.refused or c.failed
    )
    return "\n".join([*lines, "", *(f"- {text}" for text in refusals)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument("--world-sizes", nargs="*", type=int, default=WORLD_SIZES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, json.loads((Path(arguments.work) / "cells.json").read_text()))
        return 0
    families = [f for f in FAMILIES if not arguments.only or f.name in arguments.only]
    asked = cells_of(families)
    cells = [cell for w in arguments.world_sizes for cell in measure(asked, w)]
    bad = [cell for cell in cells if not cell.is_good]
    exact = [cell.error for cell in cells if cell.error is not None]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    summary = (
        f"{len(families)} models, {len(cells)} cells: {len(exact)} exact or measured (worst "
        f"{max(exact):.1e}), {sum(bool(c.refused) for c in cells)} refused, {len(bad)} beyond "
        f"{BOUND:g} or failed. {versions}"
    )
    text = f"{table(cells)}\n\n{summary}\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(f"# Families\n\n`python -m benchmarks.families`\n\n{text}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
