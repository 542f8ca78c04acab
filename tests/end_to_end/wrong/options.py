"""Wrong options of `train`."""

from __future__ import annotations

OPTIONS = {
    "K zero": (["--gradient-accumulation-steps", "0"], "gradient_accumulation_steps=0 is below 1"),
    "K word": (
        ["--gradient-accumulation-steps", "two"],
        "gradient_accumulation_steps='two' is not an integer",
    ),
    "K fraction": (
        ["--gradient-accumulation-steps", "2.5"],
        "gradient_accumulation_steps='2.5' is not an integer",
    ),
    "B negative": (["--batch-size", "-1"], "batch_size=-1 is below 1"),
    "lr zero": (["--lr", "0"], "lr=0 must be above 0"),
    "lr word": (["--lr", "fast"], "lr='fast' is not a number"),
    "lr nan": (["--lr", "nan"], "lr=nan is not a finite number"),
    "scheduler": (
        ["--scheduler", "cosin"],
        ("scheduler=cosin is not known", "did you mean cosine?"),
    ),
    "warmup": (["--warmup", "lots"], "warmup='lots' is not a warm-up"),
    "warmup too long": (
        ["--steps", "5", "--warmup", "9"],
        "warmup=9 is 9 updates, but the run has only 5",
    ),
    "steps and epochs": (
        ["--steps", "5", "--epochs", "1"],
        "steps=5 and epochs=1 both say how long",
    ),
    "lr scaling": (["--lr-scaling", "linear"], "lr_scaling=linear needs lr_base_batch_size"),
    "set unknown": (
        ["--set", "batchsize=4"],
        ("unknown option 'batchsize'", "did you mean batch_size?"),
    ),
    "set without value": (["--set", "lr"], "--set lr is not key=value"),
    "set twice": (["--lr", "0.1", "--set", "lr=0.2"], "lr is given twice on the command line"),
    "name of a Trainer": (
        ["--learning-rate", "1"],
        "No such option '--learning-rate'. Did you mean '--lr'?",
    ),
    "its batch": (["--per_device_train_batch_size", "4"], "Did you mean '--batch-size'?"),
    "its epochs": (["--num-train-epochs=3"], "Did you mean '--epochs'?"),
    "its updates": (["--max-steps", "5"], "Did you mean '--steps'?"),
    "its name in a setting": (
        ["--set", "learning_rate=1"],
        ("unknown option 'learning_rate'", "did you mean lr?"),
    ),
    "its workers": (
        ["--dataloader-num-workers", "4"],
        ("No such option '--dataloader-num-workers'. Leave it out: rows are tokenised before",),
    ),
    "workers": (["--num-workers=2"], "a thread makes the next window while one is trained on"),
    "workers in a setting": (
        ["--set", "num_workers=2"],
        "unknown option 'num_workers'. Leave it out: rows are tokenised before training",
    ),
    "a slip": (["--batch-sise", "4"], "Did you mean '--batch-size'?"),
    "unknown option": (["--grad-acum-steps", "4"], "No such option '--grad-acum-steps'"),
    "K and B_eff beside the default B": (
        ["--gradient-accumulation-steps", "3", "--global-batch-size", "10"],
        (
            "global_batch_size=10 contradicts micro_batch_size=4",
            "leave gradient_accumulation_steps out (it would be 3)",
        ),
    ),
    "K against B_eff": (
        ["--batch-size", "4", "--gradient-accumulation-steps", "8", "--global-batch-size", "64"],
        "global_batch_size=64 contradicts micro_batch_size=4 x gradient_accumulation_steps=8",
    ),
    "amp twice": (["--amp", "--mixed-precision", "bf16"], "mixed_precision=bf16 is given too"),
    "fp16 on a CPU": (["--mixed-precision", "fp16"], "mixed_precision=fp16 needs a GPU"),
    "attention unknown": (
        ["--attention", "sdpaa"],
        ("attention=sdpaa cannot be used with model=tiny", "use sdpa or eager"),
    ),
    "flash in float32": (
        ["--attention", "flash_attention_2"],
        "attention=flash_attention_2 ",
    ),  # or it is not installed
    "flex on a CPU": (
        ["--attention", "flex_attention"],
        "attention=flex_attention gives no gradient on a CPU",
    ),
    "offload of nothing": (["--cpu-offload"], "give engine (zero1 to zero3, fsdp2)"),
    "offload of what is not sharded": (
        ["--cpu-offload", "--engine", "single"],
        "host memory, but engine=single shards none; give engine (zero1 to zero3, fsdp2)",
    ),
    "activations offloaded alone": (
        ["--activation-offload"],
        "only with gradient_checkpointing, and gradient_checkpointing is off",
    ),
    "activations offloaded and compiled": (
        ["--activation-offload", "--gradient-checkpointing", "--compile"],
        "activation_offload moves what blocks keep, but compile decides what that is; leave one",
    ),
    "engine of nobody": (
        ["--engine", "deepspeed"],
        "engine=deepspeed is not known; give one of single, ddp, fsdp2, zero1, zero2, zero3",
    ),
    "engine for several": (
        ["--engine", "ddp"],
        ("engine=ddp on 1 process: it averages gradients over two or more", "torchrun"),
    ),
    "shards for several": (
        ["--engine", "fsdp2"],
        "FSDP2 shards over processes, and there is one, which no launcher started",
    ),
    "groups of nothing": (
        ["--shard-size", "2", "--engine", "zero3"],
        "shard_size=2 is for FSDP2, but engine=zero3; give engine=fsdp2, or leave shard_size out",
    ),
    "two engines": (
        ["--engine", "zero2", "--zero-stage", "zero3"],
        "engine=zero2 and zero_stage=zero3 name two engines; give one of them",
    ),
    "engine and stage": (
        ["--engine", "ddp", "--set", "zero_stage=1"],
        "engine=ddp and zero_stage=zero1 name two engines",
    ),
    "engine of runs apart": (
        ["--engine", "ddp", "--parallel-independent", "--cuda-ids", "0,1"],
        "engine=ddp shares a gradient between processes, and each of the parallel_independent",
    ),
    "tracker of no kind": (
        ["--report-to", "tensorboard,wandbb"],
        "report_to=tensorboard,wandbb: wandbb is no tracker; give one or several of tensorboard",
    ),
    "project of nothing": (
        ["--report-project", "mine"],
        "report_project=mine has an effect only with report_to",
    ),
    "peak of nothing": (["--peak-tflops", "0"], "peak_tflops=0 must be above 0"),
    "lines of nothing": (["--log-every", "0"], "log_every=0 is below 1"),
    "shares of two": (
        ["--rank-weights", "2,1"],
        "rank_weights=2,1 are 2 shares, but there is 1 process",
    ),
    "share of nothing": (["--rank-weights", "2,0"], "rank_weights=2,0 are not shares"),
    "share of words": (["--rank-weights", "big,small"], "rank_weights=big,small are not shares"),
    "B and tokens": (
        ["--batch-size", "4", "--max-tokens-per-micro-batch", "4096", "--global-batch-size", "64"],
        "batch_size=4 and max_tokens_per_micro_batch=4096 both say how large a micro-batch may be",
    ),
    "tokens without a window": (["--max-tokens-per-micro-batch", "4096"], "give global_batch_size"),
    "tokens and K": (
        ["--max-tokens-per-micro-batch", "4096", "--gradient-accumulation-steps", "8"],
        "give global_batch_size, and leave gradient_accumulation_steps out",
    ),
    "too few tokens": (
        ["--max-tokens-per-micro-batch", "100", "--global-batch-size", "8"],
        "max_tokens_per_micro_batch=100 is below max_seq_len=512",
    ),
    "auto without a window": (
        ["--batch-size", "auto"],
        "batch_size=auto makes as many micro-batches",
    ),
    "B of another word": (["--batch-size", "largest"], "batch_size='largest' is not an integer"),
    "layout": (["--layout", "paced"], ("layout=paced is not known", "did you mean packed?")),
    "multiple": (["--pad-to-multiple-of", "0"], "pad_to_multiple_of=0 is below 1"),
    "lora dropout": (["--use-peft", "--lora-dropout", "1.0"], "lora_dropout=1 must be below 1"),
    "lora modules": (
        ["--use-peft", "--lora-target-modules", "q_prog"],
        ("lora_target_modules=q_prog", "q_proj"),
    ),
    "rank of no adapter": (
        ["--lora-r", "8"],
        ("lora_r=8 has an effect only with use_peft", "use_peft is off"),
    ),
    "alpha of no adapter": (
        ["--lora-alpha", "8"],
        "lora_alpha=8.0 has an effect only with use_peft",
    ),
    "dropout of no adapter": (
        ["--lora-dropout", "0.1"],
        "lora_dropout=0.1 has an effect only with use_peft",
    ),
    "targets of no adapter": (
        ["--set", "lora_target_modules=q_proj"],
        "lora_target_modules=q_proj has an effect only",
    ),
    "modules of no adapter": (
        ["--lora-modules-to-save", "lm_head"],
        "lora_modules_to_save=lm_head has an effect only",
    ),
    "adapter that is not": (["--no-use-peft", "--merge-adapter"], "give use_peft too"),
    "base of no scaling": (
        ["--lr-base-batch-size", "8"],
        ("lr_base_batch_size=8 has an effect only with lr_scaling", "lr_scaling is none"),
    ),
    "restarts of no runs": (
        ["--max-restarts", "5"],
        "max_restarts=5 has an effect only with parallel_independent",
    ),
    "padding of packed rows": (
        ["--layout", "packed", "--pad-to-multiple-of", "8"],
        "pad_to_multiple_of=8 has no effect with layout=packed",
    ),
    "devices of no runs": (["--cuda-ids", "0,1"], "cuda_ids=0,1 is for independent runs"),
    "half of the columns": (
        ["--prompt-column", "q"],
        "prompt_column=q and completion_column=None belong together",
    ),
    "two kinds of columns": (
        ["--prompt-column", "q", "--completion-column", "a", "--text-column", "t"],
        "prompt_column=q and text_column=t both say",
    ),
    "columns of no data": (
        ["--text-column", "t"],
        "text_column=t has no effect without data of yours",
    ),
    "template missing": (
        ["--chat-template", "no.jinja"],
        "chat_template=no.jinja cannot be read: No such file",
    ),
    "sequence too long": (
        ["--max-seq-len", "4096"],
        "max_seq_len=4096 is more than the 2048 positions of model=tiny",
    ),
    "unknown model": (["--model", "no/such-model"], "model=no/such-model"),
    "missing file": (["--dataset-file", "nowhere.jsonl"], "data file nowhere.jsonl does not exist"),
    "missing config": (["--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    "two data sets": (
        ["--dataset", "a", "--dataset-file", "b.jsonl"],
        "both name the training data",
    ),
    "unreachable hub": (
        ["--dataset", "no/such-data"],
        "dataset no/such-data cannot be loaded from the hub",
    ),
    "resume nowhere": (["--resume", "nowhere"], "resume=nowhere is no folder"),
    "evaluation without rows": (
        ["--dataset-file", "b.jsonl", "--eval-every", "5"],
        "eval_every=5 needs eval_file",
    ),
}
