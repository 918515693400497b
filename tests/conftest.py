"""Makes samples and checks importable from other test files, and says under what all tests run."""

import os
import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[1]))

# Tests are small and may run side by side: more threads would only wait for each other. Before anything imports torch.
for library in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(library, "1")

# How long an example takes says more about the machine and its other work than about soundly.
settings.register_profile("soundly", deadline=None)
settings.load_profile("soundly")
