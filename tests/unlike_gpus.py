"""One of two ranks whose GPUs may differ: what each decides about one kernel for packed samples.

python -m tests.unlike_gpus FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers

from accum_trainer import Accumulator
from accum_trainer.speed import cutting


class Model:
    """A model as far as its configuration decides."""

    def __init__(self, config: transformers.PreTrainedConfig) -> None:
        self.config = config


def main(folder: str) -> None:
    acc = Accumulator(
        micro_batch_size=1, gradient_accumulation_steps=1, cpu=True, mixed_precision="bf16"
    )
    engine, llama = acc.engine, transformers.LlamaConfig
    vision = transformers.LlavaConfig(text_config=llama(attention_dropout=0.1))

    def decide(have_it: tuple[int, ...], config: transformers.PreTrainedConfig) -> bool:
        cutting.has_varlen = lambda *_: engine.rank in have_it
        return cutting.runs_as_one_kernel(engine, Model(config))

    found = [decide((0,), llama()), decide((0, 1), llama())]
    found += [decide((0, 1), llama(attention_dropout=0.1)), decide((0, 1), vision)]
    Path(folder, f"{engine.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
