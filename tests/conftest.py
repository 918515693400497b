"""Makes tests/ops/samples.py and the checks importable from other test files, however pytest is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
