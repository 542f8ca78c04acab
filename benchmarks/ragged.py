"""Real text of uneven length: our updates against those of the trainers that people use, on the
same samples.

    python benchmarks/ragged.py [--data FILE.jsonl] [--model DIR] [--k 8 16] [--updates 12] [--peers
    trainer grouped trl]
                                [--max-tokens 4096] [--compile]

Every loop trains an equal model with AdamW and clipping, B = 8. `trainer` is `transformers.Trainer`
as documented, `grouped` the same with its length grouping, `trl` TRL's SFTTrainer, `padded` our own
without packing, `eager` our own without `--compile`. All but `grouped`, whose order is its own, get
the samples of each update in the same order, so that each pair of updates compares the same work.
Updates are timed in turn in
one process, the first of each pair alternating; the figure is the median of the pairs' ratios, in
samples per second. Without --data the rows are the documentation strings that Python carries;
without --model a Llama of 5M parameters. Their memory: `benchmarks/memory.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from accum_trainer import Accumulator, TrainConfig, causal_lm_loss
from accum_trainer.data.tokenizing import TokenizedRows
from accum_trainer.lm.model import compile_blocks, load_model, load_tokenizer
from accum_trainer.lm.packed_attention import attend_inside_samples
from accum_trainer.sources.collating import PackingCollator, PaddingCollator
from accum_trainer.train.rows import load_rows
from accum_trainer.window_plan import Cost, Cut, global_order
from benchmarks.overhead import KEEP_FREED_MEMORY

B, MAX_NORM, LR = 8, 1.0, 1e-5
LABELS = {
    "trainer": "`transformers.Trainer`",
    "grouped": "`transformers.Trainer`, length grouping",
    "trl": "TRL `SFTTrainer`",
    "padded": "ours, `--layout padded`",
    "eager": "the same without `--compile`",
}
CPU_COST = Cost(fixed=32.0, square=1e-3)


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, Any, TokenizedRows]:
    config = TrainConfig(
        model=options.model or "tiny", dataset_file=options.data, max_seq_len=options.max_seq_len
    )
    tokenizer = load_tokenizer(config)
    rows = load_rows(config, tokenizer)[0]
    torch.manual_seed(0)
    return (
        (load_model(config, tokenizer) if options.model else five_million(tokenizer)),
        tokenizer,
        rows,
    )


def five_million(tokenizer: Any) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
    }
    special = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, use_cache=False, **sizes, **special
    )
    return LlamaForCausalLM(config)


def ours(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: TokenizedRows,
    k: int,
    order: list[int],
    max_tokens: int | None = None,
    packed: bool = True,
) -> Iterator[int]:
    """One update per `next`; how many tokens it had. Micro-batches of B samples, or of so many
    tokens, packed as `train` does on a CPU."""
    if packed:
        assert attend_inside_samples(model), "the model does not run sdpa"
    acc = Accumulator(
        micro_batch_size=None if max_tokens else B,
        global_batch_size=B * k,
        max_grad_norm=MAX_NORM,
        cpu=True,
    )
    model, optimizer = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True))
    collate = PackingCollator() if packed else PaddingCollator(tokenizer.pad_token_id or 0)
    cut = Cut(None if max_tokens else B, max_tokens, packed=packed, cost=CPU_COST)
    windows = acc.windows(
        [rows[i] for i in order], collate_fn=collate, shuffle=False, cut=cut, prefetch=True
    )
    for window in windows:
        for batch in window:
            with acc.accumulate(model):
                acc.backward(causal_lm_loss(model, batch))
        acc.step(optimizer)
        yield window.num_tokens


def trainer(
    which: str,
    model: torch.nn.Module,
    tokenizer: Any,
    rows: TokenizedRows,
    k: int,
    order: list[int],
    logged: list[dict[str, float]] | None = None,
    **arguments: Any,
) -> Iterator[int]:
    """A Trainer that makes one update per `next`: it runs in a thread and waits in a callback
    between updates.

    Args:
        logged: takes what it logs, one update late.
        arguments: of TrainingArguments, instead of those here.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    go, done = threading.Semaphore(0), threading.Semaphore(0)
    failed: list[BaseException] = []
    tokens = 0

    class Counting(PaddingCollator):
        def __call__(self, samples: list[Any]) -> dict[str, torch.Tensor]:
            nonlocal tokens
            tokens += sum(len(sample["input_ids"]) for sample in samples)
            return super().__call__(samples)

    class Step(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            done.release()
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()
            go.acquire()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if logged is not None:
                logged.append(dict(logs))

    folder = tempfile.mkdtemp()
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": B,
        "gradient_accumulation_steps": k,
        "num_train_epochs": 1,
        "use_cpu": True,
        "max_grad_norm": MAX_NORM,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "group_by_length" if which == "grouped" else "sequential",
    }
    common |= arguments
    data = [{**rows[i], "length": int(rows.lengths[i])} for i in order]
    if which == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        made = SFTTrainer(
            model=model,
            args=SFTConfig(**common, bf16=False, gradient_checkpointing=False, max_length=None),
            train_dataset=Dataset.from_list(data).remove_columns("length"),
            processing_class=tokenizer,
            callbacks=[Step()],
        )
    else:
        made = Trainer(
            model=model,
            args=TrainingArguments(**common),
            data_collator=Counting(tokenizer.pad_token_id or 0),
            train_dataset=data,
            callbacks=[Step()],
        )

    def train() -> None:
        try:
            made.train()
        except BaseException as error:
            failed.append(error)
        finally:
            done.release()

    threading.Thread(target=train, daemon=True).start()
    done.acquire()  # it is ready to begin
    while True:
        go.release()
        done.acquire()
        if failed:
            raise failed[0]
        yield tokens
        tokens = 0


def timed(loop: Iterator[int]) -> tuple[float, int]:
    begun = time.perf_counter()
    tokens = next(loop)
    return time.perf_counter() - begun, tokens


def compare(
    first: Callable[[], Iterator[int]],
    second: Callable[[], Iterator[int]],
    updates: int,
    same_samples: bool,
) -> tuple[float, str]:
    """Speed of the first over that of the second, and the quartiles where each pair of updates
    compares the same samples."""
    loops = first(), second()
    for loop in loops:
        next(loop)  # the first update allocates
    pairs = []
    for pair in range(updates):
        pairs.append([(0.0, 0), (0.0, 0)])
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            pairs[-1][which] = timed(loops[which])
    if not same_samples:
        seconds, tokens = ([[one[i] for one in pair] for pair in pairs] for i in (0, 1))
        speeds = [
            sum(t[which] for t in tokens) / sum(s[which] for s in seconds) for which in (0, 1)
        ]
        return speeds[0] / speeds[1], "of all together"
    ratios = [theirs[0] / mine[0] for mine, theirs in pairs]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return median, f"{low:.2f} to {high:.2f}"


def make_loop(
    which: str,
    model: torch.nn.Module,
    tokenizer: Any,
    rows: TokenizedRows,
    k: int,
    order: list[int],
    max_tokens: int | None = None,
) -> Iterator[int]:
    if which == "compiled":
        compile_blocks(model, torch.device("cpu"))
    if which in ("ours", "padded", "eager", "compiled"):
        # Compiled blocks are padded, and so is what they are compared with.
        return ours(model, tokenizer, rows, k, order, max_tokens, packed=which == "ours")
    return trainer(which, model, tokenizer, rows, k, order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="rows for training; default: the embedded corpus")
    parser.add_argument(
        "--model", help="a folder that from_pretrained loads; default: a Llama of 5M parameters"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--max-seq-len", type=int, default=512)
    parser.add_argument("--peers", nargs="+", choices=LABELS, default=["trainer", "grouped", "trl"])
    parser.add_argument(
        "--max-tokens",
        type=int,
        help="cut ours by tokens instead of B; B x 512 needs no more memory",
    )
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument(
        "--uniform", action="store_true", help="only rows of one length: what sorting cannot help"
    )
    parser.add_argument("--out")
    options = parser.parse_args()

    if (
        os.environ.get("MALLOC_TRIM_THRESHOLD_") is None
    ):  # read when a process starts, so start again
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.ragged", *sys.argv[1:]],
            os.environ | KEEP_FREED_MEMORY,
        )

    model, tokenizer, rows = load(options)
    what = "ours" + ", compiled" * options.compile + ", equal lengths" * options.uniform
    what += f", at most {options.max_tokens} tokens at a time" if options.max_tokens else ""
    lines = [
        f"{options.data or 'embedded corpus'}, {options.model or 'Llama of 5M'} "
        f"({sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters), B={B}, CPU, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}, "
        f"{options.updates} interleaved pairs of updates",
        "",
        f"| samples per second, {what}, over | K | median | quartiles |",
        "|---|---|---|---|",
    ]
    first = "compiled" if options.compile else "ours"
    for k in options.k:
        order = choose(rows, (options.updates + 2) * B * k, options.uniform)
        for peer in options.peers:

            def start(which: str, k: int = k, order: list[int] = order) -> Iterator[int]:
                return make_loop(
                    which, copy.deepcopy(model), tokenizer, rows, k, order, options.max_tokens
                )

            ratio, spread = compare(
                lambda: start(first),
                lambda peer=peer: start(peer),
                options.updates,
                peer != "grouped",
            )
            lines.append(f"| {LABELS[peer]} | {k} | {ratio:.2f} | {spread} |")
            print(lines[-1], file=sys.stderr)
    print("\n".join(lines))
    if options.out:
        with open(options.out, "a") as file:
            file.write("\n".join(lines) + "\n\n")


def choose(rows: TokenizedRows, count: int, uniform: bool) -> list[int]:
    """The rows to train on: in the global order, or those nearest to the middle in length."""
    order = [int(i) for i in global_order(len(rows), 0, 0)]
    if uniform:
        middle = int(statistics.median(rows.lengths))
        order = sorted(order, key=lambda i: abs(int(rows.lengths[i]) - middle))
    while len(order) < count:
        order += order
    return order[:count]


if __name__ == "__main__":
    main()
