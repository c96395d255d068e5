"""From environment variables to the default backend of a process.

``JOBLIB_BACKEND=hybrid`` ends here, by one of two ways: the ``.pth`` file of the wheel, once joblib is imported, or
``python -m joblib_backends run``. An explicit backend in the code still wins, because only joblib's defaults change.
"""

from __future__ import annotations

from typing import Any, Final

from .backend import make_default, make_named, registered_names
from .config import Activation, activation_from_environment, silence_children
from .errors import ConfigurationError
from .report import announce

__all__ = ["activate"]

#: The name under which joblib finds the default; it shows in joblib's list of backends, so it says what it is.
_NAME: Final = "from-environment"


def activate(activation: Activation | None = None) -> None:
    """Make the backend that the environment selects the default of this process.

    Parameters
    ----------
    activation : Activation, optional
        What to select; by default what the environment says, and nothing if it says nothing.
    """
    selected = activation_from_environment() if activation is None else activation
    if selected is not None:
        make_default(_NAME, _Factory(selected))


class _Factory:
    """Makes the selected backend whenever joblib wants its default; the first time it says so."""

    def __init__(self, activation: Activation) -> None:
        self._activation = activation
        self._announced = activation.quiet

    def __call__(self, nesting_level: int | None = None) -> Any:
        backend = self._make(nesting_level)
        n_jobs = self._activation.n_jobs
        # Where the code leaves n_jobs=None, joblib's own meaning holds: one job, unless the environment says more.
        backend.default_n_jobs = 1 if n_jobs is None else n_jobs
        # joblib takes hints as a reason to leave a default that does not use threads; this one was chosen.
        backend.uses_threads = True
        self._announce()
        return backend

    def _make(self, nesting_level: int | None) -> Any:
        name = self._activation.backend
        try:
            return make_named(name, nesting_level)
        except KeyError as error:
            raise ConfigurationError.not_one_of(
                "The environment variable JOBLIB_BACKEND", name, [n for n in registered_names() if n != _NAME]
            ) from error

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            silence_children()
            announce(
                f"JOBLIB_BACKEND={self._activation.backend} from the environment is the default backend of this "
                "process (JOBLIB_BACKEND_QUIET=1 hides this line)."
            )
