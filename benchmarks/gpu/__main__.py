"""The command: run the parts that have no result yet and write the report."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.gpu import report, runner
from benchmarks.gpu.part import PARTS, ROOT, Setting


def main() -> int:
    """Exit status: 0 all parts have passed, 1 one has not, 2 there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART"
    )
    parser.add_argument("--again", action="store_true", help="also run parts that have a result")
    parser.add_argument("--small", action="store_true", help="in seconds, on the CPU")
    parser.add_argument(
        "--limit", type=float, help="seconds for each part, instead of its own limit"
    )
    parser.add_argument("--folder", help="where results are kept; default: runs/gpu-<name>")
    parser.add_argument(
        "--report", help="default: benchmarks/results/gpu-<name>.md; with --small, in the folder"
    )
    options = parser.parse_args()

    device, name = ("CPU, small", "cpu-small") if options.small else gpu()
    if not name:
        print(
            "no NVIDIA GPU is visible to torch: run this where there is one, with a torch that was "
            "built for CUDA; --small runs the same code on the CPU",
            file=sys.stderr,
        )
        return 2
    folder = Path(options.folder or ROOT / "runs" / f"gpu-{name}").absolute()
    setting = Setting("cpu" if options.small else "cuda", options.small, str(folder))
    outcomes = runner.run_parts(options.parts, setting, options.again, options.limit)
    if options.parts != list(PARTS):  # those that were asked for now or before
        outcomes = [o for o in outcomes if o.part in options.parts or o.seconds]
    default = (
        folder / "report.md"
        if options.small
        else ROOT / "benchmarks" / "results" / f"gpu-{name}.md"
    )
    target = Path(options.report or default)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(report.markdown(outcomes, device, runner.versions(), options.small))
    bad = [outcome.part for outcome in outcomes if not outcome.passed]
    print(f"{target}: " + (f"not passed: {', '.join(bad)}" if bad else "all passed"))
    return 1 if bad else 0


def gpu() -> tuple[str, str]:
    """What the GPU calls itself, with its memory and driver, and the short name of its report; ""
    where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "", ""
    found = torch.cuda.get_device_properties(0)
    words = found.name.removeprefix("NVIDIA ")
    about = f"compute capability {found.major}.{found.minor}, CUDA {torch.version.cuda}"
    return f"{words}, {found.total_memory / 1e9:.0f} GB, {about}", short_name(found.name)


def short_name(name: str) -> str:
    """`h100` of "NVIDIA H100 80GB HBM3", `rtx-4090` of "NVIDIA GeForce RTX 4090"."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    left_out = {"nvidia", "tesla", "geforce", "graphics", "device", "sxm", "pcie", "nvl"}
    kept = [
        w for w in words if w not in left_out and not re.fullmatch(r"\d+gb|hbm\w*|sxm\d|\d+g", w)
    ]
    return "-".join(kept) or "gpu"


if __name__ == "__main__":
    sys.exit(main())
