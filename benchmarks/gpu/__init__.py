"""What only a GPU can show, in parts: one command, one report.

    make gpu          or   python -m benchmarks.gpu [--parts contract waits] [--again]
    python -m benchmarks.gpu --small            the same code, small, on the CPU

part        what a part is given and gives back; the process that one runs in
runner      starts the parts, ends those that take too long, keeps their results
report      results to Markdown
contract    the engines' contract: one process, two on one GPU, NCCL; ZeRO and FSDP2
training    16-bit precision and --compile against float32 as it is
memory      running out of memory, and --batch-size auto
footprints  what `accum-trainer plan` estimates against what was allocated
packed      packed samples under each attention
waits       how often the host waits for the device
throughput  tokens per second against transformers.Trainer
"""
