"""``python -m storvsp.demo``."""

import sys

from storvsp.demo.guest import main

if __name__ == "__main__":
    sys.exit(main())
