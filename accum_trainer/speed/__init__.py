"""The fastest cut of the same batch on this machine: cost, memory, the batch size that fits."""
