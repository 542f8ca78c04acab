"""accelerate_before.py with exact accumulation: the lines that differ are marked.

`python accelerate_after.py 4` and `... 16` cut the same effective batch of 16 in two ways, and
print the same loss.
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from accum_trainer import Accumulator  # was: from accelerate import Accelerator


def collate(rows):
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


torch.manual_seed(0)
texts = [torch.randint(1, 64, (n,)) for n in torch.randint(3, 25, (50,)).tolist()]
rows = [{"ids": ids, "labels": ids.clone()} for ids in texts]
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
micro_batch_size = int(sys.argv[1]) if len(sys.argv) > 1 else 4
loader = DataLoader(rows, batch_size=micro_batch_size, collate_fn=collate)

# Clipping moves here: it acts once per update. K = 16 / (micro-batch size x processes).
acc = Accumulator(
    micro_batch_size=micro_batch_size, global_batch_size=16, max_grad_norm=1.0, cpu=True
)
model, optimizer, scheduler = acc.prepare(model, optimizer, scheduler)  # without the loader

for _ in range(3):
    for batch in acc.batches(loader):  # was: for batch in loader
        with acc.accumulate(model):  # was: accelerator.accumulate(model)
            loss = model(**batch).loss
            acc.backward(loss)  # was: accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

with torch.no_grad():
    print(f"loss {model(**collate(rows)).loss:.6f}")
