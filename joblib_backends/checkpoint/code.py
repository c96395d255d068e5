"""The identity of code: equal in every process that has the same code, and another when what it does could change.

Code that is installed (the standard library, site-packages) is known by its name and the version of its package. Code
of the user is known by what it is made of: a function by its bytecode, constants, defaults, closure and the globals
that it names; a class by its bases and members; a module by its file and what that imports. An editable install is
code of the user.

Each function, class or module is a node: a digest of what is its own, and references to other nodes. An identity is a
hash over all nodes that can be reached, where one that comes again is known by its position: so recursion ends, and
the identity does not depend on what was asked for before. Nothing is imported, and nothing run but what pickle calls.

Not seen: what is reached by a computed name (``globals()[name]``, ``getattr(module, name)``), library code patched at
run time, files that code reads. A global without content (a lock, an open file, a live random generator) is known by
its type only; a task that depends on the state of a global generator is the user's affair. Not found again though it
is the same: on Python 3.13 and newer a class inside of a function, whose constants say where it stands.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Final, Generic, TypeVar

from ..data.content import PLAIN, ContentPickler, NoContentError, is_found_by_name
from ..data.hashing import digest_of, new_hasher
from .modules import Import, imports_of_module, loaded_parts, modules_of, named_in, package_of, path_of, version_of

__all__ = ["ByObject", "CodeIdentities", "PersistentPickler"]

_T = TypeVar("_T")

#: What a class has beside what its author wrote, or what changes with the place in the file.
_NOT_OF_CLASS: Final = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__"}
    | {"__abstractmethods__", "_abc_impl", "__slotnames__"}  # the last is pickle's
)

#: Caches of what is alive.
_WEAK: Final = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)

#: Classes of libraries that only hold what others put into them.
_HOLDERS: Final = (dict, list, tuple, deque, SimpleNamespace, functools.partial, MethodType)

#: What has code of its own.
_CODE: Final = (FunctionType, MethodType, type)

#: The flag of classes that were not made by C at its start.
_HEAP_TYPE: Final = 1 << 9


class CodeIdentities:
    """Identities of functions, classes and modules, each found once: one per call.

    Code that changes while the call runs keeps the identity that it had. No closure is kept alive, unless it refers to
    itself.
    """

    def __init__(self) -> None:
        #: Versions of the packages that were met, by package.
        self.packages: dict[str, str] = {}
        self._identities: ByObject[bytes] = ByObject()
        self._nodes: ByObject[_Node] = ByObject()
        self._modules: dict[str, _Module] = {}

    def __repr__(self) -> str:
        return f"<CodeIdentities {len(self._identities)} known, {len(self.packages)} packages>"

    def of(self, value: Any) -> bytes:
        """Return the identity of a function, a class or a module, 16 bytes."""
        subject = self.subject(value)
        known = self._identities.get(subject)
        if known is None:
            known = self._walk(subject)
            self._identities.put(subject, known)
        return known

    def subject(self, value: Any) -> Any:
        """Return what stands for ``value`` among nodes: modules are known by name, as they need not be loaded."""
        return self.module(value.__name__) if isinstance(value, ModuleType) else value

    def module(self, name: str) -> _Module:
        """Return the one object that stands for a module."""
        return self._modules.setdefault(name, _Module(name))

    def version_of(self, name: Any) -> str | None:
        """As :func:`version_of`, and note the package."""
        version = version_of(name) if isinstance(name, str) else None
        if version:
            self.packages[name.partition(".")[0]] = version
        return version

    def _walk(self, root: Any) -> bytes:
        hasher = new_hasher()
        pending, positions = [root], {id(root): 0}
        for value in pending:  # grows
            node = self._node(value)
            hasher.update(node.digest)
            for reference in node.references:
                position = positions.setdefault(id(reference), len(pending))
                if position == len(pending):
                    pending.append(reference)
                hasher.update(position.to_bytes(4, "little"))
        return hasher.digest()

    def _node(self, value: Any) -> _Node:
        node = self._nodes.get(value)
        if node is None:
            node = _NodePickler(self).node_of(value)
            self._nodes.put(value, node)
        return node


class ByObject(Generic[_T]):
    """What is known of objects, for as long as they live. Those that cannot be watched are held, a few of them."""

    _MAX_HELD: Final = 8

    def __init__(self) -> None:
        self._known: dict[int, tuple[Callable[[], Any], _T]] = {}
        self._held: list[int] = []

    def __len__(self) -> int:
        return len(self._known)

    def get(self, value: Any) -> _T | None:
        """Return what was put for this very object, or None."""
        owner, known = self._known.get(id(value), (None, None))
        return known if owner is not None and owner() is value else None

    def put(self, value: Any, known: _T) -> None:
        """Remember ``known`` of ``value``."""
        key = id(value)
        owner: Callable[[], Any]
        try:
            # The address may have a new owner already when the callback of the old one runs: ``get`` asks for it.
            owner = weakref.ref(value, lambda _: self._known.pop(key, None))
        except TypeError:
            owner = functools.partial(_same, value)
            self._held.append(key)
            if len(self._held) > self._MAX_HELD:
                self._known.pop(self._held.pop(0), None)
        self._known[key] = (owner, known)


def _same(value: Any) -> Any:
    return value


class PersistentPickler(ContentPickler):
    """Writes what a value is, the same in every process. Subclasses say what code is known by."""

    def __init__(self, codes: CodeIdentities) -> None:
        super().__init__()
        self.codes = codes
        #: Nodes that the value refers to, in order; stays empty where code has an identity of its own.
        self.references: list[Any] = []

    def beside(self) -> PersistentPickler:
        """Return another pickler of the same kind, for a part."""
        return type(self)(self.codes)

    def persistent_id(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return None
        if kind is _Module:
            return self.known_code(value)
        if isinstance(value, set | frozenset):
            return "set", kind, self.parts_of_set(value), getattr(value, "__dict__", None)
        if "_metadata_request" in getattr(value, "__dict__", ()):
            # A scorer of scikit-learn: the requests refer to their owner, a cycle; their text says all.
            return "requester", kind, {**vars(value), "_metadata_request": str(value._metadata_request)}
        return super().persistent_id(value)

    def parts_of_set(self, values: Collection[Any]) -> Any:
        parts = []
        for value in values:
            pickler = self.beside()
            parts.append((pickler.digest(value), pickler.references))
        parts.sort(key=lambda part: part[0])
        for _, references in parts:
            self.references += references
        return [digest for digest, _ in parts]

    def reducer_override(self, value: Any) -> Any:
        """Called by pickle for what it cannot write by itself, before it looks for a name."""
        reduce = copyreg.dispatch_table.get(type(value))
        reduction = reduce(value) if reduce is not None else value.__reduce_ex__(5)
        # pickle would look a name up, and say nothing of what it stands for: compiled functions, caches of functions.
        return _as_written(self._named(value, reduction)) if isinstance(reduction, str) else reduction

    def _named(self, value: Any, name: str) -> tuple[Any, ...]:
        kind = type(value)
        module = getattr(value, "__module__", None) or kind.__module__
        wrapped = getattr(value, "__wrapped__", None)
        version = self.codes.version_of(module)
        file = self.codes.module(module) if version is None and wrapped is None else None
        return "named", kind.__qualname__, module, name, version, file, wrapped


def _as_written(description: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a reduction in whose place pickle writes ``description``."""
    return tuple, (description,)


class _Module:
    """A module by its name, loaded or not: what a function imports is loaded only when it has run."""

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass(frozen=True)
class _Node:
    """What is its own of a function, a class or a module, and to what others it refers, in order."""

    digest: bytes
    references: tuple[Any, ...]


class _NodePickler(PersistentPickler):
    """Writes one node. Other code is only referred to; what has no content is written as its type."""

    #: Whether something without content is replaced by its type, or an error.
    replaces = True

    def node_of(self, value: Any) -> _Node:
        if isinstance(value, _Module):
            description = self._module(value.name)
        elif isinstance(value, type):
            description = self._class(value)
        else:
            description = self._function(value)
        digest = self.digest(description)
        return _Node(digest, tuple(self.references))

    # ---- what the kinds of code are made of

    def _function(self, function: FunctionType) -> tuple[Any, ...]:
        version = self.codes.version_of(function.__globals__.get("__name__"))
        name = (function.__module__, function.__qualname__, version)
        if version is not None and is_found_by_name(function):
            version_by_name = self.codes.version_of(function.__module__)
            # Else a library wrapped a function of the user, and gave it that one's name.
            if version_by_name is not None:
                return "installed function", *name, version_by_name
        state = [self._part(part) for part in (function.__defaults__, function.__kwdefaults__, vars(function))]
        closure = [self._cell(cell) for cell in function.__closure__ or ()]
        around = self._surroundings(function) if version is None else None
        return "function", *name, function.__code__, state, closure, around

    def _surroundings(self, function: FunctionType) -> tuple[Any, ...]:
        names, imports = named_in(function.__code__)
        known = function.__globals__
        named = {name: self._part(known[name]) for name in names if name in known}
        return named, self._imported(imports, known.get("__package__"))

    def _cell(self, cell: Any) -> Any:
        try:
            return "cell", self._part(cell.cell_contents)
        except ValueError:
            return "empty cell"

    def _class(self, kind: type) -> tuple[Any, ...]:
        version = self.codes.version_of(kind.__module__)
        if version is not None and (is_found_by_name(kind) or not kind.__flags__ & _HEAP_TYPE):
            return "installed class", kind.__module__, kind.__qualname__, version
        members = {name: self._part(vars(kind)[name]) for name in sorted(set(vars(kind)) - _NOT_OF_CLASS)}
        return "class", kind.__module__, kind.__qualname__, version, type(kind), kind.__bases__, members

    def _module(self, name: str) -> tuple[Any, ...]:
        version = self.codes.version_of(name)
        if version is not None:
            return "installed module", name, version
        path = path_of(name)
        content = None
        if path is not None:
            with contextlib.suppress(OSError):
                content = digest_of(Path(path).read_bytes())
        imported = self._imported(imports_of_module(name), package_of(name))
        # A package may have modules that others imported, and that are reached as its attributes.
        inside = {part.__name__ for part in loaded_parts(name) if self.codes.version_of(part.__name__) is None}
        return "module", name, content, imported, [self.codes.module(part) for part in sorted(inside)]

    def _imported(self, imports: Iterable[Import], package: str | None) -> list[_Module]:
        """Return the modules of the user among what is imported, and the packages of the others."""
        found = {name for one in imports for name in modules_of(one, package)}
        own = {name for name in found if self.codes.version_of(name) is None}
        roots = {name.partition(".")[0] for name in found - own}
        return [self.codes.module(name) for name in sorted(own | roots)]

    def _part(self, value: Any) -> Any:
        """Return the content of a part, or its type if it has none."""
        for without_memo in (True, False):  # a value with a cycle can only be written with it
            pickler = self.beside()
            pickler.fast = without_memo
            with contextlib.suppress(NoContentError):
                digest = pickler.digest(value)
                self.references += pickler.references
                return digest
        return self._without_content(value)

    # ---- what pickle asks for

    def beside(self) -> _NodePickler:
        pickler = _NodePickler(self.codes)
        pickler.replaces = self.replaces
        return pickler

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, CodeType):
            return "code", *_parts_of_code(value)
        if isinstance(value, property):
            return "property", value.fget, value.fset, value.fdel
        if isinstance(value, staticmethod | classmethod):
            return type(value).__name__, value.__func__
        if isinstance(value, _WEAK):
            return "type only", type(value)
        return super().persistent_id(value)

    def known_code(self, value: Any) -> Any:
        subject = self.codes.subject(value)
        self.references.append(subject)
        if isinstance(subject, _Module):
            return "module", subject.name
        return "reference", str(subject.__module__), subject.__qualname__

    def known_generator(self, generator: Any) -> Any:
        return ("type only", type(generator)) if self.replaces else super().known_generator(generator)

    def reducer_override(self, value: Any) -> Any:
        if not self.replaces:
            return super().reducer_override(value)
        if isinstance(value, _HOLDERS) or self.codes.version_of(type(value).__module__) is None:
            # Only those of its parts that have no content are left out.
            with contextlib.suppress(Exception):
                return super().reducer_override(value)
            return _as_written(self._without_content(value))
        # An object of a library, a pool or a connection, counts whole or not at all: its parts may be process ids.
        pickler = self.beside()
        pickler.replaces = False
        try:
            digest = pickler.digest(value)
        except NoContentError:
            return _as_written(self._without_content(value))
        self.references += pickler.references
        return _as_written(("whole", digest))

    def _without_content(self, value: Any) -> tuple[Any, ...]:
        """Return the type, and the functions and classes that an object holds: a cached property has a lock, too."""
        held = getattr(value, "__dict__", {})
        return "type only", type(value), {name: held[name] for name in held if isinstance(held[name], _CODE)}


def _parts_of_code(code: CodeType) -> tuple[Any, ...]:
    """Return what code does, without where it stands."""
    arguments = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_code, code.co_exceptiontable, code.co_consts, names, arguments
