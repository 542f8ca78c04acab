"""Host memory of a machine while a run is continued, against the same run that starts anew: no
process needs room for the whole checkpoint.

    python benchmarks/resuming.py [--processes 2] [--size 60M] [--engines ddp zero2 fsdp2]

A Llama is trained with AdamW for one update on the CPU, and continued for another. Memory is what
the processes hold that no file backs, all together, sampled every 5 ms until the first record.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu.models import SIZES, llama
from benchmarks.loading import held
from tests.launching import ROOT, environment

ENGINES = {
    "ddp": ([], {}),
    "zero2": (["--zero-stage", "zero2"], {}),
    "zero3": (["--zero-stage", "zero3"], {}),
    "fsdp2": ([], {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
}


def most_held(folder: Path, engine: str, processes: int, steps: int) -> int:
    """Bytes, until update `steps`, the first that this start makes."""
    options, variables = ENGINES[engine]
    train = [
        *("-m", "accum_trainer.train", "--cpu", "--model", str(folder / "model")),
        *("--batch-size", "1", "--max-seq-len", "64", "--steps", str(steps)),
        *("--output-dir", str(folder / engine), *options),
    ]
    launched = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={processes}", *train),
        ],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS=1, MALLOC_TRIM_THRESHOLD_=0, **variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    records, most = folder / engine / "metrics.jsonl", 0
    while launched.poll() is None:
        pids = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        if records.exists() and len(records.read_text().splitlines()) >= steps:
            break
        most = max(most, held(pids))
        time.sleep(0.005)
    if launched.wait() != 0:
        raise RuntimeError(f"{engine} failed")
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="60M")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=[*ENGINES])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Its vocabulary is that of the tokenizer which comes with the embedded text.
        from accum_trainer import TrainConfig
        from accum_trainer.lm.model import load_tokenizer

        tokenizer = load_tokenizer(TrainConfig())
        model = llama(options.size, vocab_size=len(tokenizer))
        size = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        del model
        print(
            f"A Llama of {size / 1e6:.0f}M parameters, AdamW: {12 * size / 1e9:.2f} GB of weights "
            f"and state; {options.processes} processes, CPU, float32\n"
        )
        print("| engine | starts anew, GB | continues, GB | ratio |\n|---|---|---|---|")
        for engine in options.engines:
            anew, again = (most_held(folder, engine, options.processes, n) for n in (1, 2))
            print(
                f"| {engine} | {anew / 1e9:.2f} | {again / 1e9:.2f} | {again / anew:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
