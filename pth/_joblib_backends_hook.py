"""Run by joblib_backends.pth at interpreter start when JOBLIB_BACKEND is set: select the backend once joblib is there.

This file stands beside the package and not in it, because importing ``joblib_backends`` imports joblib. It costs a
program that never imports joblib one entry in ``sys.meta_path``, and one that imports joblib without using it
nothing more: a placeholder stands for the backend until joblib first wants its default. So a value that cannot be
used, or a package that is gone, is met there, and never breaks an import.
"""

import sys
from _thread import get_ident

#: The name under which joblib finds the default; the same as in joblib_backends/activation.py.
NAME = "from-environment"


def install():
    """Wait for the import of joblib, or put the placeholder in at once if joblib is imported already."""
    if "joblib" in sys.modules:
        _put_placeholder()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds joblib by asking every other finder, and adds to its loader what happens after the import."""

    def __init__(self):
        # Threads that are in find_spec: another hook of this kind may ask all finders, too, this one among them.
        self._searching = set()

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "joblib" or get_ident() in self._searching:
            return None
        self._searching.add(get_ident())
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._searching.discard(get_ident())
        # Whoever only asks where joblib is gets a spec too, so the finder stays until joblib has been loaded.
        if hasattr(getattr(spec, "loader", None), "exec_module"):
            spec.loader = _Loader(spec.loader, self)
        return spec

    def _ask_others(self, *arguments):
        for finder in list(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec(*arguments) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


class _Loader:
    """Loads joblib with the loader that Python chose, to which everything else is passed on."""

    def __init__(self, loader, finder):
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name):
        if name == "_loader":  # a copy that is not initialized yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module):
        # Who asks the module for its source or its data files must find the loader that Python chose.
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _put_placeholder()


class _Placeholder:
    """Stands for the selected backend until joblib wants its default: joblib_backends costs 35 ms on top of joblib."""

    def __init__(self, parallel):
        self._parallel = parallel
        self._before = (parallel.DEFAULT_BACKEND, parallel.DEFAULT_PROCESS_BACKEND)
        parallel.BACKENDS[NAME] = self
        parallel.DEFAULT_BACKEND = parallel.DEFAULT_PROCESS_BACKEND = NAME

    def __call__(self, nesting_level=None):
        try:
            from joblib_backends.activation import activate
        except ModuleNotFoundError as error:
            if error.name != "joblib_backends":
                raise
        else:
            activate()
        parallel = self._parallel
        if parallel.BACKENDS[NAME] is self:
            # The package is gone, or the program has removed the variable: joblib's own defaults hold again.
            parallel.DEFAULT_BACKEND, parallel.DEFAULT_PROCESS_BACKEND = self._before
            return parallel.BACKENDS[parallel.DEFAULT_BACKEND](nesting_level=nesting_level)
        return parallel.BACKENDS[NAME](nesting_level=nesting_level)


def _put_placeholder():
    parallel = sys.modules.get("joblib.parallel")
    # A user's own joblib.py, or a joblib too old for the package, is left alone.
    if all(hasattr(parallel, name) for name in ("BACKENDS", "DEFAULT_BACKEND", "DEFAULT_PROCESS_BACKEND")):
        _Placeholder(parallel)
