"""One file = one feature. `discover` finds them; nothing else has to be edited to add one."""

import importlib
import pkgutil
from functools import cache

from raytrain_adv.transforms.transform import STAGES, Change, Plan, Transform

__all__ = ["STAGES", "Change", "Plan", "Transform", "discover"]


@cache
def discover() -> tuple[type[Transform], ...]:
    """Return every transform class that a module of this package defines, in the order of
    application (stage, then name).

    A class that a module merely imports is another module's.
    """
    found: list[type[Transform]] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += [
            kind
            for kind in vars(module).values()
            if isinstance(kind, type)
            and issubclass(kind, Transform)
            and kind.__module__ == module.__name__ != Transform.__module__
        ]
    return tuple(sorted(found, key=lambda t: (STAGES.index(t.stage), t.name)))
