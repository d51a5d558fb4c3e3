"""``python -m storvsp.demo``."""

import sys

from storvsp.demo.half import PROGRAM

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
