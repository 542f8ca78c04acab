"""`python -m accum_trainer` is the command `accum-trainer`."""

from accum_trainer.cli import main

main()
