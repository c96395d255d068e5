"""Each interpreter imports this that has the folder on its PYTHONPATH: installed packages are hidden from it.

``HIDDEN_MODULES`` names them. What has come in a zip file is found all the same.
"""

import importlib.machinery
import os
import sys

HIDDEN = frozenset(filter(None, os.environ.get("HIDDEN_MODULES", "").split(",")))


class Hiding:
    """A finder that knows only which modules there are not."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in HIDDEN:
            return None
        zipped = [entry for entry in sys.path if entry.endswith(".zip")]
        spec = importlib.machinery.PathFinder.find_spec(name, zipped)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


sys.meta_path.insert(0, Hiding)
