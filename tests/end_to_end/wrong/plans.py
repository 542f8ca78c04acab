"""Wrong arguments of commands that look at no run, and commands that do not exist."""

from __future__ import annotations

PLAN = {
    "B zero": (["--batch-size", "0"], "batch_size=0 is below 1"),
    "B word": (["--batch-size", "four"], "batch_size='four' is not an integer"),
    "B of nobody knows": (
        ["--batch-size", "auto", "--global-batch-size", "8"],
        ("batch_size=auto is found on the device", "give a number to plan with"),
    ),
    "K against B_eff": (
        ["--batch-size", "4", "--gradient-accumulation-steps", "3", "--global-batch-size", "64"],
        ("global_batch_size=64 contradicts", "leave gradient_accumulation_steps out"),
    ),
    "B_eff beyond 64 bits": (
        ["--global-batch-size", str(1 << 64)],
        f"global_batch_size={1 << 64} is beyond 64 bits",
    ),
    "processes zero": (["--processes", "0"], "world_size=0 is below 1"),
    "processes word": (["--processes", "two"], "'two' is not a valid integer"),
    "samples zero": (["--num-samples", "0"], "num_samples=0 is below 1"),
    "samples negative": (["--num-samples", "-5"], "num_samples=-5 is below 1"),
    "samples word": (["--num-samples", "many"], "'many' is not a valid integer"),
    "two counts": (
        ["--num-samples", "5", "--dataset-file", "rows.txt"],
        "num_samples=5 and dataset_file=rows.txt both say how much data there is; give one",
    ),
    "data missing": (["--dataset-file", "no.jsonl"], "data file no.jsonl does not exist"),
    "data missing that a file names": (
        ["--config", "data.yaml"],
        "error: data.yaml: data file no.jsonl does not exist",
    ),
    "data of the command line over a file": (
        ["--config", "data.yaml", "--dataset-file", "gone.csv"],
        "error: data file gone.csv does not exist",
    ),
    "data a folder": (["--dataset-file", "folder"], "data file folder is a folder; name one file"),
    "data empty": (["--dataset-file", "empty.jsonl"], "data file empty.jsonl is empty"),
    "data of no kind": (["--dataset-file", "launch.yaml"], "ends in '.yaml'; give .txt, .jsonl"),
    "data not text": (["--dataset-file", "binary.txt"], "line 1 is not UTF-8 text"),
    "header twice": (["--dataset-file", "twice.csv"], "the header has column a 2 times"),
    "parquet that is none": (["--dataset-file", "no.parquet"], "cannot be read as parquet"),
    "warm-up of words": (["--warmup", "lots"], "warmup='lots' is not a warm-up; give updates"),
    "warm-up too long": (
        ["--steps", "5", "--warmup", "9"],
        ("warmup=9 is 9 updates, but the run has only 5", "shorten the warm-up or train longer"),
    ),
    "warm-up beyond all": (["--steps", "5", "--warmup", "200%"], "warmup='200%' is not a warm-up"),
    "epochs of warm-up": (
        ["--steps", "5", "--warmup", "1ep"],
        "warmup=1ep counts epochs, but the data has no length; give updates or a percentage",
    ),
    "base of scaling": (
        ["--lr-scaling", "sqrt"],
        "lr_scaling=sqrt needs lr_base_batch_size, the effective batch at which lr=0.0003",
    ),
    "memory word": (["--model", "tiny", "--gpu-memory", "big"], "gpu_memory=big is not a size"),
    "memory zero": (["--model", "tiny", "--gpu-memory", "0"], "gpu_memory=0 must be above 0"),
    "memory of nothing": (
        ["--gpu-memory", "80"],
        "gpu_memory=80 is compared with what a model needs; give --model too",
    ),
    "no such model": (["--model", "no/such"], "model=no/such"),
    "a folder without model": (["--model", "folder"], "model=folder"),
    "engine for several": (
        ["--engine", "ddp"],
        "engine=ddp shares the gradient between processes, but processes=1; say how many there are",
    ),
    "engine for one": (
        ["--engine", "single", "--gpus-per-node", "2"],
        "engine=single is one process, but processes=2; leave --processes out",
    ),
    "runs apart on several": (
        ["--parallel-independent", "--cuda-ids", "0,1", "--processes", "2"],
        "each of the parallel_independent runs is one process, but processes=2",
    ),
    "runs apart on who knows what": (
        ["--parallel-independent"],
        "parallel_independent without cuda_ids trains on all GPUs of the machine",
    ),
    "share of nothing": (
        ["--shard", "3/9", "--num-samples", "2"],
        "shard=3/9 of 2 samples is empty; use at most 2 shards",
    ),
    "fp16 with FSDP": (
        ["--model", "tiny", "--engine", "fsdp2", "--precision", "fp16", "--processes", "2"],
        "mixed_precision=fp16 needs a loss scaler, and there is none for engine=fsdp2",
    ),
    "an option of train with a wrong value": (["--log-every", "0"], "log_every=0 is below 1"),
    "its name in a Trainer": (["--max-steps", "5"], "Did you mean '--steps'?"),
    "a contradiction in a file": (
        ["--config", "both.yaml"],
        "error: both.yaml: steps=5 and epochs=2 both say how long to train",
    ),
    "a value in a file": (
        ["--config", "both.yaml", "--epochs", "3", "--warmup", "9%x"],
        "error: warmup='9%x' is not a warm-up",
    ),
    "a size in a file": (
        [
            "--config",
            "three.yaml",
            "--global-batch-size",
            "8",
            "--gradient-accumulation-steps",
            "4",
        ],
        "error: three.yaml and command line: global_batch_size=8 contradicts micro_batch_size=3",
    ),
    "config missing": (["--config", "no.yaml"], "cannot read the configuration no.yaml: No such"),
    "config of a launcher": (["--config", "launch.yaml"], "unknown option 'compute_environment'"),
    "config with options of nobody": (["--config", "extra.yaml"], "unknown option 'a'"),
    "lengths both": (["--steps", "5", "--epochs", "2"], "steps=5 and epochs=2 both say how long"),
}
VERIFY = {
    "windows zero": (["--windows", "0"], "'--windows': 0 is not in the range x>=1"),
    "windows word": (["--windows", "all"], "'all' is not a valid integer"),
    "report nowhere": (
        ["--json", "no/such/report.json"],
        "json=no/such/report.json cannot be written: there is no folder no/such",
    ),
    "report in a folder": (["--json", "folder"], "json=folder cannot be written: it is a folder"),
    "report below a file": (["--json", "rows.txt/a"], "json=rows.txt/a cannot be written"),
    "K zero": (["--gradient-accumulation-steps", "0"], "gradient_accumulation_steps=0 is below 1"),
    "loop of no file": (["--loop", "no.py:update"], "loop=no.py:update: there is no file no.py"),
    "loop of no function": (["--loop", "loop.py:no"], "has no function no; it has update"),
    "loop without colon": (["--loop", "loop.py"], "loop=loop.py does not name a function; give"),
    "loop without name": (["--loop", "loop.py:"], "loop=loop.py: does not name a function; give"),
    "loop that is no Python": (["--loop", "rows.txt:update"], "rows.txt is not a Python file"),
    "loop that fails": (["--loop", "bad.py:update"], "bad.py cannot be imported: ZeroDivisionErr"),
    "loop that is broken": (["--loop", "broken.py:update"], "cannot be imported: SyntaxError"),
    "loop of two": (["--loop", "two.py:update"], "give it these five parameters"),
    "loop in another order": (["--loop", "order.py:update"], "put them in this order"),
    "loop that ends Python": (["--loop", "ends.py:update"], "ends.py cannot be imported"),
    "loop that is a number": (["--loop", "number.py:update"], "has no function update"),
    "loop on shards": (
        ["--loop", "loop.py:update", "--engine", "zero2"],
        "engine=zero2, but a loop on plain Accelerate is checked on single here",
    ),
    "data missing": (["--dataset-file", "no.csv"], "data file no.csv does not exist"),
    "unknown option": (["--windws", "3"], "No such option '--windws'"),
    "value left out": (["--windows"], "Option '--windows' requires an argument"),
}
COMPLETION = {
    "no shell": ([], "Missing argument 'bash|zsh|fish'"),
    "a shell of others": (["tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
}
ANY = {
    "no such command": (["trian"], "No such command 'trian'. Did you mean 'train'?"),
    "a command in capitals": (["Compare"], "Did you mean 'compare'?"),
    "a command cut short": (["cmp"], "Did you mean 'compare'?"),
    "a command of others": (["finetune"], "Did you mean 'train'?"),
    "a part of a command": (["export"], "Did you mean 'checkpoint export'?"),
    "nothing like a command": (["zzz"], "No such command 'zzz'. There are train, verify, plan"),
    "an option of none": (["--verbose"], "No such option '--verbose'"),
    "config without a verb": (["config", "make"], "No such command 'make'"),
    "checkpoint without a verb": (["checkpoint", "import"], "No such command 'import'"),
}
