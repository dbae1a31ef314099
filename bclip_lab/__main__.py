"""`python -m bclip_lab`."""

import sys

from bclip_lab.cli import main

sys.exit(main())
