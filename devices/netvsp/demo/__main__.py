"""``python -m netvsp.demo``."""

import sys

from netvsp.demo.half import PROGRAM

if __name__ == "__main__":
    sys.exit(PROGRAM.main())
