"""LoRA under DeepSpeed ZeRO-2, on two processes: `torchrun --nproc_per_node 2 lora_zero2.py`.

ZeRO-2 shards the optimizer state and the gradients of the adapters; the frozen base model stays
whole on each process. The update is that of one process (`python lora_zero2.py`, without ZeRO).
"""

import os

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from accum_trainer import Accumulator, causal_lm_loss

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, adapters)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
rows = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(1, 64, (44, 12), generator=torch.Generator().manual_seed(1))
]

world_size = int(os.environ.get("WORLD_SIZE", 1))  # ZeRO shards over processes: one has nothing
acc = Accumulator(
    micro_batch_size=2,
    global_batch_size=16,
    max_grad_norm=1.0,
    cpu=not torch.cuda.is_available(),
    **({"zero_stage": 2} if world_size > 1 else {}),
)
model, optimizer = acc.prepare(model, torch.optim.AdamW(trained, lr=1e-2))

for window in acc.windows(rows):  # 16, 16 and 12 samples
    for batch in window:
        with acc.accumulate(model):
            acc.backward(causal_lm_loss(model, batch))
    update = acc.step(optimizer)
    if acc.accelerator.is_main_process:
        print(f"update {update.step}  loss {update.loss:.5f}  norm {update.grad_norm:.5f}")
