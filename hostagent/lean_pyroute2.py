"""pyroute2 without what the agent does not use: a third of its memory.

`import pyroute2` brings in a network database with SQL, wireless, IPVS, a 9P server and more. This puts a module in its
place that knows where the parts are, and IPRoute; asked for anything else it becomes the whole of
pyroute2, so that nobody else in the process can tell the difference. Whoever has imported pyroute2 before keeps it.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Lean(ModuleType):
    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__file__, self.__loader__ = spec, spec.origin, spec.loader
        self.__path__ = spec.submodule_search_locations or []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "IPRoute":
            found = importlib.import_module("pyroute2.iproute").IPRoute
            setattr(self, name, found)
            return found
        if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def install() -> None:
    """Let `import pyroute2` mean the lean one from here on, unless there is one already."""
    if "pyroute2" in sys.modules:
        return
    spec = importlib.util.find_spec("pyroute2")
    if spec is not None:
        sys.modules["pyroute2"] = _Lean(spec)
