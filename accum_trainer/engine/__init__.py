"""Engines move gradients, behind one contract. Only they know accelerate and DeepSpeed.

    base            the contract: the life of one window, named capabilities
    single          one process, and the contract with a torch optimizer
    ddp             torch's DistributedDataParallel, over NCCL or gloo
    fsdp            torch's FSDP2
    zero            DeepSpeed ZeRO, one class per stage; zero_state, zero_config: its tensors, JSON
    build           the registry: from a request to the engine in force, or an EngineError
    ranks           talk between processes
    full_state      whole tensors by parameter name, however they are sharded
    memory          in use, free, run out
    grad_sync       when gradients are exchanged
    step, usage     arithmetic of an optimizer step; parameters that a backward uses
    settings, request           choices for every engine; an engine as it is asked for
    lost_processes              processes that were asked for and not started

A new engine is one file with a subclass of `Engine`, and one entry in `build.ENGINES`;
`pytest tests/engine` runs the contract on it.
"""
