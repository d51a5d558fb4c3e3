"""``python -m vmbus.cli``, for where the script is not on the path."""

import sys

from vmbus.cli import main

sys.exit(main())
