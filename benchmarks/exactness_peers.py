"""The loops that `exactness.py` measures: ours and each peer as its own documentation writes it,
one run per process.

    python benchmarks/exactness_peers.py PEER KIND RESULT
    (started by exactness.py, under torchrun for 2 processes)

Every loop gets the same rows in the same order, the same weights and plain SGD, and knows nothing
of being measured: a `Probe` reads the gradient from a hook of the optimizer just before the step,
and the rows from a hook of the model. What a loop sets beyond its documentation is only what the
comparison needs: CPU, float32, no shuffling, no clipping.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

B, K = 4, 4  # micro-batch; micro-batches of an update per process
WHOLE, TAIL = 3, 11  # whole windows of the epoch; rows of its last, uneven one
VOCABULARY, LONGEST, IGNORE = 97, 40, -100
LR = 0.1


def make_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """`count` different samples of 2 to 40 tokens, a random part of each masked as its prompt."""
    rng = np.random.RandomState(seed)
    rows = []
    for _ in range(count):
        length = int(rng.randint(2, LONGEST + 1))
        ids = rng.randint(1, VOCABULARY, length).tolist()
        prompt = int(rng.randint(0, length))
        rows.append({"input_ids": ids, "labels": [IGNORE] * prompt + ids[prompt:]})
    assert len({tuple(row["input_ids"]) for row in rows}) == count  # a row is known by its tokens
    return rows


def make_windows(world_size: int) -> list[list[dict]]:
    """The rows of each update of one epoch: three whole windows and an uneven one."""
    size = B * K * world_size
    rows = make_rows(WHOLE * size + TAIL)
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """One padded batch; every loop uses it as its collate function, but TRL, which has its own."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in values])

    ids = [row["input_ids"] for row in rows]
    mask = [[1] * len(row) for row in ids]
    labels = filled([row["labels"] for row in rows], IGNORE)
    return {"input_ids": filled(ids, 0), "attention_mask": filled(mask, 0), "labels": labels}


def make_model(kind: str) -> torch.nn.Module:
    """A small `llama` or `gpt2` without dropout, in float32, always with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes, **no_dropout)
        )
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token losses: position i predicts label i + 1."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def num_targets(labels: torch.Tensor) -> torch.Tensor:
    return (labels[..., 1:] != IGNORE).sum()


def big_batch(model: torch.nn.Module, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Gradient, by parameter, of the mean loss over all targets of `rows` as one batch, in the
    dtype of `model`.

    Llama's own code rounds to float32 inside its norms, in float64 too: that much of the rounding
    is in the reference.
    """
    model.zero_grad()
    batch = pad(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    (summed_loss(logits, batch["labels"]) / num_targets(batch["labels"])).backward()
    return gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.detach().double() for name, p in model.named_parameters() if p.grad is not None
    }


def relative_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over all parameters together, relative to the norm of the exact
    gradient."""
    assert found.keys() == exact.keys(), found.keys() ^ exact.keys()
    difference = sum(((found[name] - exact[name]) ** 2).sum().item() for name in exact)
    return math.sqrt(difference / sum((g**2).sum().item() for g in exact.values()))


class Probe:
    """A model and its SGD, watched: `errors` of each update, `seen` row numbers of each update and
    of none (last)."""

    def __init__(self, kind: str, world_size: int) -> None:
        self.windows = make_windows(world_size)
        self.rows = [row for window in self.windows for row in window]
        self.number = {tuple(row["input_ids"]): index for index, row in enumerate(self.rows)}
        self.model, self.exact = make_model(kind), make_model(kind).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.errors: list[float | None] = []
        self.seen: list[list[int]] = [[]]
        self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.optimizer.register_step_pre_hook(self._before_step)

    def _before_forward(self, model: torch.nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        for ids, mask in zip(
            inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True
        ):
            self.seen[-1].append(
                self.number[tuple(i for i, real in zip(ids, mask, strict=True) if real)]
            )

    def _before_step(self, *_: Any) -> None:
        update = len(self.errors)
        error = None
        if update < len(self.windows):
            with torch.enable_grad():
                self.exact.load_state_dict(self.model.state_dict())
                error = relative_error(
                    gradients(self.model), big_batch(self.exact, self.windows[update])
                )
        self.errors.append(error)
        self.seen.append([])

    def loader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=B, shuffle=False, collate_fn=pad)


def ours(probe: Probe) -> None:
    from accum_trainer import Accumulator, causal_lm_loss

    acc = Accumulator(micro_batch_size=B, gradient_accumulation_steps=K, cpu=True)
    model, optimizer = acc.prepare(probe.model, probe.optimizer)
    for window in acc.windows(probe.rows, collate_fn=pad, shuffle=False):
        for batch in window:
            with acc.accumulate(model):
                acc.backward(causal_lm_loss(model, batch))
        acc.step(optimizer)


def accelerate_accumulate(probe: Probe) -> None:
    """Accelerate, usage guide "Performing gradient accumulation": the finished code."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=K)
    model, optimizer, loader = accelerator.prepare(probe.model, probe.optimizer, probe.loader())
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()


def accelerate_token_count(probe: Probe) -> None:
    """Accelerate, same guide, "training samples of variable size", counting the labels that a
    shifted loss uses."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=K)
    model, optimizer, loader = accelerator.prepare(probe.model, probe.optimizer, probe.loader())
    batches = iter(loader)
    updates = math.ceil(len(loader) / K)
    remainder = len(loader) % K or K
    for update in range(updates):
        window = [next(batches) for _ in range(K if update < updates - 1 else remainder)]
        local_items = sum(num_targets(batch["labels"]) for batch in window)
        items = accelerator.gather(local_items).sum().item()
        for index, batch in enumerate(window):
            local = index < len(window) - 1 and accelerator.num_processes > 1
            with model.no_sync() if local else contextlib.nullcontext():
                outputs = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                )
                loss = summed_loss(outputs.logits, batch["labels"])
                accelerator.backward(loss * K * accelerator.num_processes / items)
        optimizer.step()
        optimizer.zero_grad()


def trainer_options(folder: str) -> dict[str, Any]:
    """Arguments of a Trainer that fix the comparison, and silence; everything else stays at its
    default."""
    batch = {
        "per_device_train_batch_size": B,
        "gradient_accumulation_steps": K,
        "num_train_epochs": 1,
    }
    fixed = {"use_cpu": True, "max_grad_norm": 0, "train_sampling_strategy": "sequential"}
    quiet = {
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return batch | fixed | quiet | {"output_dir": folder}


def transformers_trainer(probe: Probe) -> None:
    from transformers import Trainer, TrainingArguments, get_constant_schedule

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=probe.model,
            args=TrainingArguments(**trainer_options(folder)),
            data_collator=pad,
            train_dataset=probe.rows,
            optimizers=(probe.optimizer, get_constant_schedule(probe.optimizer)),
        ).train()


def trl_sft_trainer(probe: Probe) -> None:
    """TRL on a pre-tokenised data set with a `labels` column; bf16, its default, is off as
    everywhere here."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, get_constant_schedule
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(WordLevel({str(index): index for index in range(VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="0", unk_token="0"
    )
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model=probe.model,
            args=SFTConfig(**trainer_options(folder), bf16=False),
            train_dataset=Dataset.from_list(probe.rows),
            processing_class=tokenizer,
            optimizers=(probe.optimizer, get_constant_schedule(probe.optimizer)),
        ).train()


def lightning_fabric(probe: Probe) -> None:
    """Lightning Fabric, "Efficient Gradient Accumulation", counting from 1 so that each K batches
    make an update."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=world_size())
    fabric.launch()
    model, optimizer = fabric.setup(probe.model, probe.optimizer)
    loader = fabric.setup_dataloaders(probe.loader())
    for iteration, batch in enumerate(loader, start=1):
        is_accumulating = iteration % K != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            fabric.backward(model(**batch).loss / K)
        if not is_accumulating:
            optimizer.step()
            optimizer.zero_grad()


class Peer(NamedTuple):
    label: str
    loop: Callable[[Probe], None]
    packages: tuple[str, ...]


PEERS = {
    "ours": Peer("accum_trainer, `acc.windows`", ours, ("accum_trainer",)),
    "accumulate": Peer("Accelerate, `accumulate()`", accelerate_accumulate, ("accelerate",)),
    "token-count": Peer("Accelerate, token count by hand", accelerate_token_count, ("accelerate",)),
    "trainer": Peer("`transformers.Trainer`", transformers_trainer, ("transformers",)),
    "trl": Peer("TRL `SFTTrainer`", trl_sft_trainer, ("trl", "datasets")),
    "fabric": Peer("Lightning Fabric, `no_backward_sync`", lightning_fabric, ("lightning",)),
}


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def main() -> None:
    peer, kind, result = sys.argv[1:]
    torch.set_num_threads(1)
    probe = Probe(kind, world_size())
    PEERS[peer].loop(probe)
    with open(f"{result}-{os.environ.get('RANK', 0)}.json", "w") as file:
        json.dump({"errors": probe.errors, "seen": probe.seen}, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
