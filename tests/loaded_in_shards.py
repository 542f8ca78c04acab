"""One of two ranks that load a model under ZeRO-3 as `train` does: what it holds of each parameter.

python -m tests.loaded_in_shards FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accum_trainer import Accumulator, TrainConfig
from accum_trainer.lm.model import load_tokenizer
from accum_trainer.train.model import load_same


def main(folder: str) -> None:
    acc = Accumulator(micro_batch_size=1, gradient_accumulation_steps=1, zero_stage=3, cpu=True)
    read = load_same(TrainConfig(model=folder, cpu=True), acc.engine, load_tokenizer(TrainConfig()))
    import deepspeed

    held = {name: p.ds_tensor.numel() for name, p in read.named_parameters()}
    with deepspeed.zero.GatheredParameters(list(read.parameters())):
        sums = {name: float(p.double().sum()) for name, p in read.named_parameters()}
    Path(folder, f"{acc.engine.rank}.json").write_text(json.dumps([held, sums]))


if __name__ == "__main__":
    main(*sys.argv[1:])
