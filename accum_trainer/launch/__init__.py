"""Starting trainings: launch files per mode, the launcher, independent runs, merging."""
