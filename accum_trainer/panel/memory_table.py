"""The memory that each engine needs, by `accum-trainer plan` in another process: torch takes
seconds to import, and the panel does without it."""

from __future__ import annotations

import asyncio
import html
import re
import tempfile
from pathlib import Path

from accum_trainer.config import TrainConfig
from accum_trainer.panel.commands import PROGRAM
from accum_trainer.panel.programs import environment, python_for

_LIMIT_SEC = 120.0


async def memory_table(config: TrainConfig, processes: int, engine: str) -> str:
    """HTML of the table; the row of the engine in use is marked.

    Args:
        engine: as in `LaunchSpec`.
    """
    with tempfile.TemporaryDirectory(prefix="accum_trainer-panel-") as folder:
        file = Path(folder, "run.yaml")
        file.write_text(config.to_yaml(), encoding="utf-8")
        arguments = ["--config", str(file), "--model", config.model, "--processes", str(processes)]
        process = await asyncio.create_subprocess_exec(
            *python_for([PROGRAM, "plan", *arguments]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(),
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), _LIMIT_SEC)
        except asyncio.TimeoutError:
            process.kill()
            return f"No answer after {_LIMIT_SEC:.0f} seconds."
    if process.returncode != 0:
        return html.escape(err.decode(errors="replace").strip() or "It failed without a word.")
    used = "single" if engine == "ddp" and processes == 1 else engine
    return _as_table(out.decode(errors="replace"), used)


def _as_table(report: str, used: str) -> str:
    lines = report.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("GB per process"))
    head = re.split(r"\s{2,}", lines[first].strip())
    rows: list[list[str]] = []
    notes: list[list[str]] = []
    for line in lines[first + 1 :]:
        cells = re.split(r"\s{2,}", line.strip())
        (rows if len(cells) == len(head) else notes).append(cells)
    # The total first: the rest explains it, and may lie beyond a narrow page.
    order = [0, head.index("total"), *(i for i in range(1, len(head)) if head[i] != "total")]
    head, rows = [head[i] for i in order], [[cells[i] for i in order] for cells in rows]
    body = "".join(
        f"<tr{' class=used' if cells[0] == used else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for cells in rows
    )
    titles = "".join(f"<th scope=col>{html.escape(title)}</th>" for title in head)
    said = "".join(f"<p>{html.escape(' '.join(cells))}</p>" for cells in notes)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>{said}'
