"""The fastest cut of the same batch on this machine: its cost, and the largest micro-batch."""
