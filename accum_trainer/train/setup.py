"""From a configuration to the parts of a training: engine, data, model, optimizer, windows.

Everything that can be wrong with a configuration is found here, before the first file is written.
`train` runs the parts; it does not make them.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from accum_trainer.accumulator import Accumulator, Windows
from accum_trainer.batch_plan import BatchPlan, lr_factor, parse_shard, scale_lr, warmup_updates
from accum_trainer.config import TrainConfig
from accum_trainer.data import embedded, files
from accum_trainer.data.tokenizing import TokenizedRows, take_columns, tokenize
from accum_trainer.engine.build import choose_precision
from accum_trainer.engine.lost_processes import note_on_lost_processes
from accum_trainer.errors import ConfigError, DataError, EngineError
from accum_trainer.lm.model import (
    compile_blocks,
    fingerprint,
    frozen_dtype,
    is_flash,
    load_model,
    load_tokenizer,
    stored_dtype,
)
from accum_trainer.losses.head import LossPath, decide_loss_path
from accum_trainer.losses.targets import SHIFTED
from accum_trainer.seeds import seed_of
from accum_trainer.sources.collating import PackingCollator, PaddingCollator
from accum_trainer.speed.batch_size import Fit
from accum_trainer.speed.cutting import Cutting, decide_cut, decide_layout


@dataclass(frozen=True)
class Training:
    """What a training is made of.

    Attributes:
        model: as the engine wrapped it.
        rows, eval_rows: tokenised samples; `eval_rows` is None where nothing is evaluated.
        cutting: how windows become micro-batches, and why.
        loss_path: where logits are made.
        objective: what the loss sums over, in words.
        compiled_blocks: how many of the model's blocks torch compiles.
        plan: the batch plan, with the number of samples that this run trains on in an epoch.
        initial_weights: fingerprint of the weights before training, where there is one; runs that
            share it can be merged.
        total_updates: updates that the whole run makes if none is skipped.
        warmup: updates of warm-up.
        peak_lr: the learning rate after scaling.
        identity: what decides the windows and the model; a run is continued only where these agree.
        notes: what a person should know before training starts.
    """

    config: TrainConfig
    accumulator: Accumulator
    model: torch.nn.Module
    tokenizer: Any
    collate: PaddingCollator | PackingCollator
    cutting: Cutting
    loss_path: LossPath
    objective: str
    compiled_blocks: int
    optimizer: Any
    scheduler: Any
    windows: Windows
    rows: TokenizedRows
    eval_rows: TokenizedRows | None
    plan: BatchPlan
    initial_weights: str | None
    total_updates: int
    warmup: int
    peak_lr: float
    identity: dict[str, Any]
    notes: list[str]


def make_accumulator(config: TrainConfig) -> Accumulator:
    """The accumulator that `config` asks for: from here on the processes know of each other.

    Raises:
        ConfigError, EngineError: sizes or settings that contradict each other.
    """
    return Accumulator(
        micro_batch_size=None if config.batch_size == "auto" else config.batch_size,  # type: ignore[arg-type]
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        global_batch_size=config.global_batch_size,
        max_grad_norm=config.max_grad_norm,
        grad_sync=config.grad_sync,
        accumulation_dtype=config.accumulation_dtype,
        recover_from_oom=config.recover_from_oom,
        mixed_precision=choose_precision(config.mixed_precision, config.amp, config.cpu),
        **_engine_options(config),
    )


def assemble(config: TrainConfig, accumulator: Accumulator | None = None) -> Training:
    """Make the parts of the training that `config` describes, on every process alike.

    Args:
        accumulator: what `make_accumulator(config)` gave, where that was called before.

    Raises:
        ConfigError, DataError, EngineError: what is wrong on any process, on all of them, before
            anything is written to the run directory.
    """
    accumulator = accumulator or make_accumulator(config)
    engine = accumulator.engine
    engine.together(_check_files, config)
    tokenizer = engine.main_first(load_tokenizer, config)
    rows, eval_rows = engine.main_first(load_rows, config, tokenizer)
    _check_same_rows(engine, "training", rows)
    _check_same_rows(engine, "evaluation", eval_rows)
    shard = parse_shard(config.shard)
    plan = accumulator.plan.for_samples(_share(len(rows), shard))
    per_epoch = plan.updates_per_epoch
    assert per_epoch is not None
    total = config.steps if config.steps is not None else per_epoch * (config.epochs or 1)
    warmup = warmup_updates(config.warmup, total, per_epoch)
    peak_lr = scale_lr(
        config.lr, config.lr_scaling, plan.global_batch_size, config.lr_base_batch_size
    )

    torch.manual_seed(
        config.seed
    )  # the same initial weights on every process, and under every split
    # Where weights are sharded while they are loaded, loading is an exchange itself.
    load = load_model if engine.shards_weights else partial(engine.together, load_model)
    plain_model = load(config, tokenizer, frozen_dtype(config, engine.mixed_precision))
    initial_weights = fingerprint(plain_model)
    _check_same_weights(engine, config, initial_weights)
    _check_attention(plain_model, engine)
    # Fused: one pass over weights and states instead of ten.
    plain_optimizer = torch.optim.AdamW(
        _decay_groups(plain_model, config.weight_decay), lr=peak_lr, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        plain_optimizer, lr_factor(config.scheduler, warmup, total)
    )
    model, optimizer, scheduler = accumulator.prepare(plain_model, plain_optimizer, schedule)
    some_tokens = torch.tensor([rows[0]["input_ids"]], device=engine.device)
    loss_path = decide_loss_path(model, some_tokens, config.loss_on_targets)
    pad = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    layout = decide_layout(config, accumulator, model, rows)
    objective = _prove_objective(
        accumulator, rows, pad
    )  # before compiling, which it would have done for its sizes
    compiled = _compile(config, engine, model) if config.compile else 0
    cutting = decide_cut(config, accumulator, model, optimizer, rows, layout)
    cut = cutting.cut
    # From here on chance means dropout, which must differ between processes, and between runs on
    # shares of the data.
    torch.manual_seed(seed_of("dropout", config.seed, rank=engine.rank, shard=shard[0]))

    collate = (
        PackingCollator(layout.boundaries) if cut.packed else PaddingCollator(pad, cut.multiple)
    )
    return Training(
        config=config,
        accumulator=accumulator,
        model=model,
        tokenizer=tokenizer,
        collate=collate,
        cutting=cutting,
        loss_path=loss_path,
        objective=objective,
        compiled_blocks=compiled,
        optimizer=optimizer,
        scheduler=scheduler,
        windows=accumulator.windows(
            rows, collate_fn=collate, seed=config.seed, shard=shard, cut=cut, prefetch=True
        ),
        rows=rows,
        eval_rows=eval_rows,
        plan=plan,
        initial_weights=initial_weights,
        total_updates=total,
        warmup=warmup,
        peak_lr=peak_lr,
        identity={
            "global_batch_size": plan.global_batch_size,
            "use_peft": config.use_peft,
            **{name: getattr(config, name) if config.use_peft else None for name in _LORA},
            "model": config.model,
            "max_seq_len": config.max_seq_len,
            "seed": config.seed,
            "num_samples": len(rows),
            "shard": config.shard,
            "data": f"{config.dataset_file or config.dataset or 'embedded'} (content "
            f"{rows.identity[:12]})",
            "data_content": rows.identity[:12],
            "initial_weights": initial_weights,
            "model_config": _model_config(plain_model),
        },
        notes=_notes(config, accumulator, rows, plan, loss_path, cutting.fit),
    )


def _prove_objective(accumulator: Accumulator, rows: TokenizedRows, pad: int) -> str:
    """What this model's loss sums over: proven on a few samples that all processes share.

    Raises:
        EngineError: BatchNorm, whose statistics depend on how a window is cut.
        ConfigError: the model's own loss does not predict the next token.
    """
    with_targets = np.flatnonzero(rows.num_targets)[:4]
    few = PaddingCollator(pad)([rows[int(index)] for index in with_targets])
    objective = accumulator.losses.decide([few])
    assert objective is not None
    if objective.reduction and objective.counting != SHIFTED:
        raise ConfigError(
            "train predicts the next token, but this model's own loss is a "
            f"{objective.describe()}; "
            "give a causal language model, or write the loop with Accumulator"
        )
    return objective.describe()


# What decides, beside the base model, which function adapters compute and which of them are
# trained.
_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save")
# Where it came from, and how it is run.
_NOT_THE_MODEL = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "name_or_path",
}


def _model_config(model: Any) -> dict[str, Any]:
    """What decides, beside the weights, which function the model computes: dropout, positions,
    activations."""
    options = json.loads(json.dumps(model.config.to_dict(), default=str))
    return {
        key: v
        for key, v in options.items()
        if not key.startswith("_") and key not in _NOT_THE_MODEL
    }


def _compile(config: TrainConfig, engine: Any, model: Any) -> int:
    """Compile the model's blocks, where the engine's own code is not in the way; return how
    many."""
    if engine.name == "zero3":
        raise ConfigError(
            "compile=true cannot see through zero3, which fetches each weight when it is used; "
            "leave it out, or use zero2 or fsdp2"
        )
    return compile_blocks(engine.unwrap(model), engine.device)


def _check_attention(model: Any, engine: Any) -> None:
    attention = getattr(model.config, "_attn_implementation", None) or ""
    if attention == "flex_attention" and engine.device.type == "cpu":
        raise ConfigError(f"attention={attention} gives no gradient on a CPU; use attention=sdpa")
    if is_flash(attention) and (engine.device.type == "cpu" or engine.mixed_precision == "no"):
        raise ConfigError(
            f"attention={attention} needs a GPU and 16-bit numbers, and this is a "
            f"{engine.device.type} with mixed_precision="
            f"{engine.mixed_precision}; use attention=sdpa"
            + ("" if engine.device.type == "cpu" else ", or amp")
        )


def _share(num_samples: int, shard: tuple[int, int]) -> int:
    """Samples of an epoch that fall to `shard`."""
    share = len(range(num_samples)[shard[0] :: shard[1]])
    if share == 0:
        raise ConfigError(
            f"shard={shard[0]}/{shard[1]} of {num_samples} samples is empty; use at most "
            f"{num_samples} shards"
        )
    return share


def _engine_options(config: TrainConfig) -> dict[str, Any]:
    """What the configuration asks of the engine, where it asks for something; the launcher may ask
    for the rest."""
    options: dict[str, Any] = {"cpu": True} if config.cpu else {}
    if config.zero_stage != "none":
        options["zero_stage"] = int(config.zero_stage.removeprefix("zero"))
    if config.cpu_offload:
        options["cpu_offload"] = True
    return options


def _check_files(config: TrainConfig) -> None:
    for path in (config.dataset_file, config.eval_file):
        if path is not None:
            files.check_file(path)


def _check_same_rows(engine: Any, what: str, rows: TokenizedRows | None) -> None:
    everyones = engine.gather_objects(
        (rows.identity if rows is not None else None, socket.gethostname())
    )
    for rank, (identity, host) in enumerate(everyones):
        if identity != everyones[0][0]:
            raise DataError(
                f"process {rank} ({host}) reads other {what} rows than process 0 "
                f"({everyones[0][1]}); give all processes "
                "the same data files and tokenizer"
            )


def _check_same_weights(engine: Any, config: TrainConfig, initial_weights: str | None) -> None:
    """DDP would send rank 0's trained weights to all and leave frozen ones; an engine that shards
    would mix them."""
    everyones = engine.gather_objects((initial_weights, socket.gethostname()))
    for rank, (weights, host) in enumerate(everyones):
        if weights != everyones[0][0]:
            raise EngineError(
                f"process {rank} ({host}) starts from other weights than process 0 "
                f"({everyones[0][1]}): checksums {weights} "
                f"and {everyones[0][0]}; does model={config.model} name the same files on both?"
            )


def load_rows(config: TrainConfig, tokenizer: Any) -> tuple[TokenizedRows, TokenizedRows | None]:
    columns = (config.prompt_column, config.completion_column, config.text_column)

    def from_table(
        table: Any, name: str, digest: str, columns: tuple[str | None, ...] = columns
    ) -> TokenizedRows:
        if any(columns):  # what is trained on is part of what the data are
            table, digest = take_columns(table, name, *columns), f"{digest} {columns}"
        return tokenize(table, name, digest, tokenizer, config.max_seq_len)

    def from_file(path: Any, name: str) -> TokenizedRows:
        return from_table(
            files.read_file(path, [c for c in columns if c]), name, files.digest(path)
        )

    def embedded_rows(path: Any, name: str) -> TokenizedRows:
        return from_table(files.read_file(path), name, files.digest(path), ())

    if config.dataset_file is not None:
        rows = from_file(config.dataset_file, config.dataset_file)
    elif config.dataset is not None:
        table = files.read_hub(config.dataset)
        rows = from_table(table, config.dataset, table._fingerprint)
    else:
        rows = embedded_rows(embedded.corpus_files()[0], "embedded corpus")
    if config.eval_file is not None:
        return rows, from_file(config.eval_file, config.eval_file)
    if config.eval_every is not None:
        return rows, embedded_rows(embedded.corpus_files()[1], "embedded evaluation rows")
    return rows, None


def _decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay, biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _notes(
    config: TrainConfig,
    accumulator: Accumulator,
    rows: TokenizedRows,
    plan: BatchPlan,
    loss_path: LossPath,
    fit: Fit | None,
) -> list[str]:
    notes = list(rows.notes)
    if fit is not None:
        notes.append(fit.describe())
    if (
        config.use_peft
        and accumulator.engine.mixed_precision == "no"
        and stored_dtype(config).itemsize < 4
    ):
        notes.append(
            "mixed_precision=no computes in float32, so the frozen weights take twice the "
            "checkpoint's memory; "
            "--amp keeps them in 16 bits"
        )
    if loss_path.note is not None and config.loss_on_targets == "auto":
        notes.append(loss_path.note)
    if config.shard is not None:
        notes.append(
            f"shard {config.shard}: {plan.num_samples} of the {len(rows)} samples of an epoch"
        )
    if accumulator.device.type == "cpu" and not config.cpu:
        notes.append("no GPU was found: training on the CPU")
    if (lost := note_on_lost_processes()) is not None:
        notes.append(lost)
    visible = torch.cuda.device_count() if accumulator.device.type == "cuda" else 0
    if visible > 1 and accumulator.engine.world_size == 1:
        notes.append(
            f"{visible} GPUs are visible and this one process uses one; "
            f"use all with accelerate launch --multi_gpu --num_processes {visible} -m "
            "accum_trainer.train"
        )
    if (plan.num_samples or 0) < plan.global_batch_size:
        notes.append(
            f"the effective batch of {plan.global_batch_size} is more than the {plan.num_samples} "
            "samples: "
            "every update sees all of them"
        )
    return notes
