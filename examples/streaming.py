"""Train on rows that are read while training goes on: files too large for memory.

Each process reads its own share of the files, and the stream yields this process's micro-batches.
Processes may run out at different times: the last windows are short, and exact. Run it on one
process, or as `torchrun --nproc_per_node 2 streaming.py`.
"""

import json
from itertools import islice
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

from accum_trainer import Accumulator, causal_lm_loss

acc = Accumulator(micro_batch_size=4, gradient_accumulation_steps=2, cpu=True)
folder = Path("runs/stream")
if acc.accelerator.is_main_process:  # stands in for your files
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        lines = [
            json.dumps({"text": f"{number} " + "na" * (1 + line % 7)}) for line in range(9 + number)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
acc.accelerator.wait_for_everyone()


def rows():
    """The rows of this process's files, one after another."""
    rank, world_size = acc.accelerator.process_index, acc.accelerator.num_processes
    for file in sorted(folder.glob("*.jsonl"))[rank::world_size]:
        with open(file) as lines:
            for line in lines:
                yield torch.tensor(list(json.loads(line)["text"].encode()))


def micro_batches():
    stream = rows()
    while batch := list(islice(stream, 4)):
        ids = pad_sequence(batch, batch_first=True)
        labels = pad_sequence(batch, batch_first=True, padding_value=-100)
        yield {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


torch.manual_seed(0)
sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
for window in acc.windows(micro_batches()):
    for batch in window:
        with acc.accumulate(model):
            acc.backward(causal_lm_loss(model, batch))
    update = acc.step(optimizer)
    if acc.accelerator.is_main_process:
        print(f"update {update.step}  samples {update.num_samples}  loss {update.loss:.4f}")
