"""``python -m trinity_megatron.cli``."""

import sys

from trinity_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
