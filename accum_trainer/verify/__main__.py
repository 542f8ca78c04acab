"""`python -m accum_trainer.verify`: the command `accum-trainer verify`."""

import sys

from accum_trainer.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
