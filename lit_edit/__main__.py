"""`python -m lit_edit` is `lit-edit`."""

import sys

from lit_edit.start import main

if __name__ == "__main__":
    sys.exit(main())
