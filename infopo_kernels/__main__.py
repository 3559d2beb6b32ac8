"""`python -m infopo_kernels`."""

import sys

from infopo_kernels.commands.cli import main

sys.exit(main())
