"""`python -m captioner` is `caption`."""

import sys

from captioner.cli import main

sys.exit(main())
