"""`python -m accum_trainer.train`: the command `accum-trainer train`."""

import sys

from accum_trainer.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
