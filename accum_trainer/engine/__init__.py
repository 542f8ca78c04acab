"""Whatever moves the gradients, behind one contract. The only code that knows accelerate.

base     the contract, and what all engines share
single   one process
ddp      torch's DistributedDataParallel, over NCCL or gloo
lost_processes  what a launcher was asked for and did not start
build    from what was asked for to the engine in force, or an EngineError
"""
