"""`python -m lit_edit` is `lit-edit`."""

import sys

from lit_edit.cli import main

if __name__ == "__main__":
    sys.exit(main())
