"""`python -m hf_dpclip`, the same as `hf-dpclip`."""

import sys

from .cli import main


sys.exit(main())
