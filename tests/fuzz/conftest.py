"""The modules beside this one, for the tests to import."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
