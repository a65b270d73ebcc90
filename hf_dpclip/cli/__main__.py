"""`python -m hf_dpclip.cli`, the same as `hf-dpclip`."""

import sys

from . import main


sys.exit(main())
