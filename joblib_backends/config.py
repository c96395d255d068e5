"""What the user asked for: one frozen value, passed whole through every floor.

Each default carries its unit and reason. This is the only file that reads ``os.environ``;
a parameter given in code wins over its ``JOBLIB_BACKEND_<PARAMETER>`` variable, which wins over the default.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from .errors import ConfigurationError

__all__ = [
    "Activation",
    "Config",
    "activation_from_environment",
    "profile_path",
    "select_backend",
    "thread_kinds_fixed",
    "variables_set",
]

PREFIX: Final = "JOBLIB_BACKEND"

#: How a variable says yes and no.
_YES: Final = frozenset({"1", "true", "yes", "on"})
_NO: Final = frozenset({"0", "false", "no", "off"})

#: Variables that fix the threads of a numerical library. A user who sets one has decided: we do not overrule.
_THREAD_VARIABLES: Final = {
    "openmp": ("OMP_NUM_THREADS",),
    "blas": ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS"),
}

#: Variables of joblib, loky, Dask and the system that say how much may be used, and where.
_OF_OTHERS: Final = {
    *(name for names in _THREAD_VARIABLES.values() for name in names),
    *("OMP_THREAD_LIMIT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "MKL_THREADING_LAYER", "OPENBLAS_CORETYPE"),
    *("JOBLIB_TEMP_FOLDER", "JOBLIB_MULTIPROCESSING", "JOBLIB_START_METHOD", "LOKY_MAX_CPU_COUNT", "LOKY_MAX_DEPTH"),
    *("DASK_SCHEDULER_ADDRESS", "DASK_CONFIG", "TMPDIR", "XDG_CACHE_HOME"),
}


@dataclass(frozen=True)
class Config:
    """Parameters of one backend, or of one call of it.

    Every field up to ``trace`` is a keyword of :class:`joblib_backends.HybridBackend`;
    the last group arrives from :class:`joblib.Parallel` with each call.
    """

    tier: str = "auto"
    scatter: tuple[Any, ...] = ()
    client: Any = None
    scheduler: str | os.PathLike[str] | None = None
    inner_max_num_threads: int | None = None
    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()

    #: Seconds to wait for a Dask scheduler and its first worker; joblib's own dask backend waits as long.
    wait_for_workers: float = 10.0

    #: Seconds after which an idle process worker ends; joblib's loky backend uses the same.
    idle_worker_timeout: float = 300.0

    #: How often a task is run again whose worker died; Dask's own ``allowed-failures`` is of that order.
    retries: int = 2

    #: Seconds that one task may run before its worker is replaced; None lets it run.
    task_timeout: float | None = None

    #: Whether a call goes on on this machine when its Dask cluster is gone or does not answer.
    fallback: bool = True

    #: Dask only: the workers that may run tasks, by name, address or host; None is all of them.
    workers: tuple[str | int, ...] | None = None

    #: Dask only: what a task takes of its worker's resources while it runs, as {"GPU": 1}; None is nothing.
    resources: Mapping[str, float] | None = None

    #: Dask only: which of several clients' tasks come first on a cluster; higher ones do. Dask's default.
    priority: float = 0

    #: TLS certificates for ``scheduler``, a ``distributed.Security``; None is what Dask's configuration says.
    security: Any = None

    #: The file in which finished tasks are kept for the next run; None keeps none.
    checkpoint: str | os.PathLike[str] | None = None

    #: Whether the common pipeline steps of a search's candidates are fitted once.
    share_fits: bool = True

    #: Bytes that the results of such steps may take at a time; None is a tenth of the machine's memory.
    share_fits_nbytes: int | None = None

    #: Whether calls show a bar: in terminals and notebooks, or "always".
    progress: bool | Literal["always"] = False

    #: Whether each batch is recorded for the timeline of its call; that takes 0.5 kB and some microseconds.
    record: bool = True

    #: The file to which each call is added as a trace; None writes none.
    trace: str | os.PathLike[str] | None = None

    #: Bytes from which a buffer leaves the pickle and is placed once; None never does. joblib's default.
    max_nbytes: int | None = 1_048_576

    #: Where buffers go when shared memory has no room; None means the system's folder for temporary files.
    temp_folder: str | None = None

    #: How workers map placed buffers. "r" and "c" give each task a private writable copy-on-write view,
    #: "r+" and "w+" one writable copy shared by the tasks of a call, None places nothing.
    mmap_mode: str | None = "r"

    #: Cores that this backend may use; None means the machine's. Set for nested backends only.
    cores: int | None = None

    #: The Dask task in which a call is made (``cluster/outer_task.py``), or None.
    outer_task: Any = None

    def __post_init__(self) -> None:
        checks = (
            _check_tier,
            _check_scatter,
            _check_cluster,
            _check_placement,
            _check_numbers,
            _check_initializer,
            _check_placing,
            _check_recovery,
        )
        for check in checks:
            check(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Config:
        """Return the configuration for keyword ``options``; None means "not given here".

        Raises
        ------
        ConfigurationError
            For an unknown name or a value that cannot be used, in code or in the environment.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return cls(**{**_from_environment(), **_checked_names(given)})

    def override(self, options: Mapping[str, Any]) -> Config:
        """Return this configuration with the ``options`` of one call; None is a value here."""
        return dataclasses.replace(self, **_checked_names(options))


@dataclass(frozen=True)
class Activation:
    """What the environment asks of the whole process."""

    backend: str
    n_jobs: int | None
    quiet: bool


def activation_from_environment() -> Activation | None:
    """Return what ``JOBLIB_BACKEND`` selects for the process, or None when it is not set.

    Raises
    ------
    ConfigurationError
        If ``JOBLIB_BACKEND_N_JOBS`` is not a whole number other than zero.
    """
    backend = os.environ.get(PREFIX, "").strip()
    if not backend:
        return None
    return Activation(backend, _environment_n_jobs(), _environment_flag(f"{PREFIX}_QUIET"))


def select_backend(name: str) -> None:
    """Set ``JOBLIB_BACKEND`` for this process and its children, unless it is set."""
    if not os.environ.get(PREFIX, "").strip():
        os.environ[PREFIX] = name


def variables_set() -> dict[str, str]:
    """Return the variables of ours that are set, by name."""
    return {name: text for name, text in sorted(os.environ.items()) if f"{name}_".startswith(f"{PREFIX}_")}


def variables_of_others() -> dict[str, str]:
    """Return the variables of others that are set and matter here, by name."""
    return {name: os.environ[name] for name in sorted(_OF_OTHERS) if name in os.environ}


def environment_of_cluster() -> dict[str, str]:
    """Return the environment for Dask processes that we start: ours, but for what makes this backend their default.

    A task that calls joblib has its place already; a worker must not make a cluster of its own.
    """
    return {name: text for name, text in os.environ.items() if name not in variables_set()}


def max_cpu_count_variable() -> str | None:
    """Return loky's ``LOKY_MAX_CPU_COUNT``, which caps the count of cores."""
    return os.environ.get("LOKY_MAX_CPU_COUNT")


def thread_kinds_fixed() -> frozenset[str]:
    """Return which of "openmp" and "blas" the user has fixed by an environment variable."""
    return frozenset(
        api for api, variables in _THREAD_VARIABLES.items() if any(name in os.environ for name in variables)
    )


def temp_folder_from_environment() -> str | None:
    """Return joblib's own ``JOBLIB_TEMP_FOLDER``, which keeps its meaning here."""
    return os.environ.get("JOBLIB_TEMP_FOLDER") or None


def profile_path() -> Path | None:
    """Return the file in which the planner keeps what it learned, or None if ``JOBLIB_BACKEND_PROFILE`` is "off".

    The variable may hold a path. Otherwise it is the user's cache folder, as each system has it.
    """
    setting = os.environ.get(f"{PREFIX}_PROFILE", "").strip()
    if setting.lower() in {"off", "0", "no", "false"}:
        return None
    if setting:
        return Path(setting)
    try:
        return _cache_folder() / "joblib_backends" / "profile-1.json"
    except RuntimeError:  # no home folder
        return None


def _cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if Path(given).is_absolute() else Path.home() / ".cache"


def _whole_number(text: str) -> int:
    return int(text)


def _yes_or_no(text: str) -> bool:
    if text.lower() not in {*_YES, *_NO}:
        raise ValueError(text)
    return text.lower() in _YES


def _progress(text: str) -> bool | str:
    return text.lower() if text.lower() == "always" else _yes_or_no(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _amounts(text: str) -> dict[str, float]:
    pairs = (pair.partition("=") for pair in _names(text))
    return {name.strip(): float(amount) for name, _, amount in pairs}


#: Parameters that a text can express, with the way to read it and the words for what is allowed.
_READERS: Final[dict[str, tuple[Callable[[str], Any], str]]] = {
    "tier": (str, "the name of a tier"),
    "scheduler": (str, "the address of a Dask scheduler, such as tcp://host:8786, a scheduler file, or local"),
    "workers": (_names, "names, addresses or hosts of Dask workers, such as node1,node2"),
    "resources": (_amounts, "amounts of resources, such as GPU=1,LICENSE=2"),
    "priority": (float, "a number"),
    "inner_max_num_threads": (_whole_number, "a whole number of at least 1"),
    "wait_for_workers": (float, "a number of seconds"),
    "idle_worker_timeout": (float, "a number of seconds"),
    "retries": (_whole_number, "a whole number of at least 0"),
    "task_timeout": (float, "a number of seconds"),
    "fallback": (_yes_or_no, "1 or 0"),
    "checkpoint": (str, "the path of a file"),
    "share_fits": (_yes_or_no, "1 or 0"),
    "progress": (_progress, "1, 0 or always"),
    "record": (_yes_or_no, "1 or 0"),
    "trace": (str, "the path of a file"),
    "share_fits_nbytes": (_whole_number, "a number of bytes"),
}
_NOT_PARAMETERS: Final = frozenset({"N_JOBS", "PROFILE", "QUIET"})
_CALL_FIELDS: Final = frozenset({"cores", "outer_task"})


def _from_environment() -> dict[str, Any]:
    values = {}
    for variable, text in os.environ.items():
        if variable.startswith(f"{PREFIX}_") and text.strip():
            name = variable.removeprefix(f"{PREFIX}_")
            if name not in _NOT_PARAMETERS:
                values[name.lower()] = _read_variable(variable, name.lower(), text.strip())
    return values


def _read_variable(variable: str, name: str, text: str) -> Any:
    if name not in _READERS:
        known = sorted(f"{PREFIX}_{known.upper()}" for known in {*_READERS, *_NOT_PARAMETERS})
        raise ConfigurationError.not_one_of("The environment variable", variable, known)
    read, allowed = _READERS[name]
    try:
        value = read(text)
        Config(**{name: value})
    except ConfigurationError as error:
        raise ConfigurationError(f"The environment variable {variable}={text!r} cannot be used: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"The environment variable {variable} is {text!r}, but must be {allowed}.") from error
    return value


def _environment_n_jobs() -> int | None:
    text = os.environ.get(f"{PREFIX}_N_JOBS", "").strip()
    if not text:
        return None
    try:
        n_jobs = int(text)
    except ValueError:
        n_jobs = 0
    if n_jobs == 0:
        raise ConfigurationError(
            f"The environment variable {PREFIX}_N_JOBS is {text!r}, but must be a whole number other than 0 "
            "(-1 for all cores)."
        )
    return n_jobs


def _environment_flag(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in {"", "0", "false", "no"}


def _checked_names(options: Mapping[str, Any]) -> dict[str, Any]:
    allowed = {field.name for field in dataclasses.fields(Config)} - _CALL_FIELDS
    for name in options:
        if name not in allowed:
            raise ConfigurationError.not_one_of("A parameter of the hybrid backend", name, sorted(allowed))
    checked = dict(options)
    for name in ("scatter", "workers"):
        if isinstance(checked.get(name), list):
            checked[name] = tuple(checked[name])
    return checked


def _check_tier(config: Config) -> None:
    if not isinstance(config.tier, str):
        raise ConfigurationError(f"tier is {config.tier!r}, but must be the name of a tier, such as 'processes'.")


def _check_scatter(config: Config) -> None:
    if not isinstance(config.scatter, tuple):
        raise ConfigurationError(
            f"scatter is a {type(config.scatter).__name__}, but must be a list of the objects to place: "
            "write scatter=[X] for one object, scatter=[X, y] for two."
        )


def _check_cluster(config: Config) -> None:
    if config.client is not None and not hasattr(config.client, "submit"):
        raise ConfigurationError(
            f"client is {config.client!r}, but must be a distributed.Client: for an address, give it as scheduler."
        )
    scheduler = config.scheduler
    if scheduler is not None and (not isinstance(scheduler, str | os.PathLike) or not os.fspath(scheduler)):
        raise ConfigurationError(
            f"scheduler is {scheduler!r}, but must be an address such as 'tcp://host:8786', the path of a scheduler "
            "file, or 'local': for a cluster object, give client=Client(cluster)."
        )
    if scheduler == "local" and config.security is not None:
        raise ConfigurationError(
            f"security is {config.security!r}, but must be left out with scheduler='local', whose scheduler and "
            "workers have no certificates: it listens on this machine only."
        )


def _check_placement(config: Config) -> None:
    workers, resources, priority = config.workers, config.resources, config.priority
    if workers is not None and not (isinstance(workers, tuple) and workers and all(map(_is_name_of_worker, workers))):
        given = list(workers) if isinstance(workers, tuple) else workers
        raise ConfigurationError(
            f"workers is {given!r}, but must be a list of names, addresses or hosts of Dask workers: for a single "
            "one, write workers=['node1']."
        )
    if resources is not None and not (isinstance(resources, Mapping) and resources and _are_amounts(resources)):
        raise ConfigurationError(
            f"resources is {resources!r}, but must be what a task takes of its worker, by name: write "
            "resources={'GPU': 1}, and start workers with --resources 'GPU=1'."
        )
    if not _is_number(priority):
        raise ConfigurationError(f"priority is {priority!r}, but must be a number: higher ones come first.")


def _is_name_of_worker(name: object) -> bool:
    # A LocalCluster numbers its workers.
    return isinstance(name, str | int) and not isinstance(name, bool) and name != ""


def _are_amounts(resources: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and name and _is_number(n) and n > 0 for name, n in resources.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(config: Config) -> None:
    threads = config.inner_max_num_threads
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise ConfigurationError(f"inner_max_num_threads is {threads!r}, but must be a whole number of at least 1.")
    for name in ("wait_for_workers", "idle_worker_timeout", "task_timeout"):
        seconds = getattr(config, name)
        if seconds is None and name == "task_timeout":
            continue
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds > 0:
            raise ConfigurationError(f"{name} is {seconds!r}, but must be a number of seconds greater than 0.")


def _check_initializer(config: Config) -> None:
    if config.initializer is not None and not callable(config.initializer):
        raise ConfigurationError(f"initializer is {config.initializer!r}, but must be a callable or None.")
    if not isinstance(config.initargs, tuple | list):
        raise ConfigurationError(
            f"initargs is {config.initargs!r}, but must be a tuple of the initializer's arguments: for a single one, "
            f"write initargs=({config.initargs!r},)."
        )


def _check_placing(config: Config) -> None:
    nbytes, folder = config.max_nbytes, config.temp_folder
    is_number = isinstance(nbytes, int | float) and not isinstance(nbytes, bool)
    if nbytes is not None and not (is_number and nbytes >= 0):
        raise ConfigurationError(
            f"max_nbytes is {nbytes!r}, but must be None, a number of bytes of at least 0, or a size such as '10M'."
        )
    if not isinstance(config.share_fits, bool):
        raise ConfigurationError(f"share_fits is {config.share_fits!r}, but must be True or False.")
    limit = config.share_fits_nbytes
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise ConfigurationError(
            f"share_fits_nbytes is {limit!r}, but must be None, a number of bytes of at least 0, or a size such as "
            "'500M'."
        )
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise ConfigurationError(f"temp_folder is {folder!r}, but must be None or the path of a folder.")
    allowed = ("r", "c", "r+", "w+")
    if config.mmap_mode is not None and config.mmap_mode not in allowed:
        raise ConfigurationError(f"mmap_mode is {config.mmap_mode!r}, but must be None or one of {allowed}.")


def _check_recovery(config: Config) -> None:
    retries = config.retries
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        raise ConfigurationError(f"retries is {retries!r}, but must be a whole number of at least 0.")
    if not isinstance(config.fallback, bool):
        raise ConfigurationError(f"fallback is {config.fallback!r}, but must be True or False.")
    if not isinstance(config.progress, bool) and config.progress != "always":
        raise ConfigurationError(f"progress is {config.progress!r}, but must be True, False or 'always'.")
    if config.security is not None and not hasattr(config.security, "get_connection_args"):
        raise ConfigurationError(
            f"security is {config.security!r}, but must be a distributed.Security: give the paths of the certificates "
            "as Security(tls_ca_file=..., tls_client_cert=..., tls_client_key=..., require_encryption=True)."
        )
    if config.checkpoint is not None and not isinstance(config.checkpoint, str | os.PathLike):
        raise ConfigurationError(f"checkpoint is {config.checkpoint!r}, but must be None or the path of a file.")
    if not isinstance(config.record, bool):
        raise ConfigurationError(f"record is {config.record!r}, but must be True or False.")
    if config.trace is not None and not isinstance(config.trace, str | os.PathLike):
        raise ConfigurationError(f"trace is {config.trace!r}, but must be None or the path of a file.")
    if config.task_timeout is not None and config.tier == "inline":
        raise ConfigurationError(
            f"task_timeout={config.task_timeout!r} cannot be kept with tier='inline', where tasks run in the calling "
            "thread, which nobody can stop: use tier='processes', or leave one of the two out."
        )
