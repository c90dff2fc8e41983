"""Puts this folder on the path, for ``checkpoint_writer``; see ``tests/conftest.py`` for why."""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parent))
