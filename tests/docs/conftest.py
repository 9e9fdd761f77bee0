"""The tests import what makes the generated pages, as MkDocs does: from docs/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
