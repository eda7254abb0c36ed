"""`python -m captioner.web` is `caption-web`."""

import sys

from captioner.web.command import main

sys.exit(main())
