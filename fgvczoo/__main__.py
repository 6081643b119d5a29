"""`python -m fgvczoo`."""

import sys

from fgvczoo.cli import main

sys.exit(main())
