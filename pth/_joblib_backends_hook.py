"""Run by joblib_backends.pth at interpreter start when JOBLIB_BACKEND is set: activate once joblib is imported.

This file imports nothing but the standard library's sys and importlib, so a program that never uses joblib pays
no more than one entry in ``sys.meta_path``. It stands beside the package and not in it, because importing
``joblib_backends`` imports joblib.
"""

import importlib.util
import sys


def install():
    """Wait for the import of joblib, or activate at once if it is imported already."""
    if "joblib" in sys.modules:
        _activate()
    elif not any(isinstance(finder, _JoblibFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _JoblibFinder())


class _JoblibFinder:
    """Finds joblib the way Python would, and activates the backend after it has been loaded."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "joblib":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _activate_after(spec.loader)
        return spec


def _activate_after(loader):
    load = loader.exec_module

    def exec_module(module):
        load(module)
        del loader.exec_module
        _activate()

    loader.exec_module = exec_module


def _activate():
    from joblib_backends.activation import activate

    activate()
