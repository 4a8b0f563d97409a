"""The modules beside this one and beside its folder, for the tests to import."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent)]
