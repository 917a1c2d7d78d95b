"""The command line of lit-edit: `python train.py fit --config mose.yaml`."""

import sys

from lit_edit.start import main

if __name__ == "__main__":
    sys.exit(main())
