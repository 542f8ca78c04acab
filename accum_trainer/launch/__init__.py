"""Starting trainings: launch files per mode, SLURM, the launcher."""
