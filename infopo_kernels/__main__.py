"""`python -m infopo_kernels`."""

import sys

from infopo_kernels.cli import main

sys.exit(main())
