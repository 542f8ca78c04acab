"""A loop as Accelerate's documentation writes it. accelerate_after.py is the same loop, exact.

Run it with a micro-batch size: `python accelerate_before.py 4` and `... 16` name the same
effective batch of 16, and print different losses.
"""

import sys

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


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

accelerator = Accelerator(gradient_accumulation_steps=16 // micro_batch_size, cpu=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

for _ in range(3):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

with torch.no_grad():
    print(f"loss {model(**collate(rows)).loss:.6f}")
