"""One file = one feature. `discover` finds them; nothing else has to be edited to add one."""

import importlib
import pkgutil

from raytrain_adv.transforms.transform import STAGES, Change, Plan, Transform

__all__ = ["STAGES", "Change", "Plan", "Transform", "discover"]


def discover() -> tuple[type[Transform], ...]:
    """Return every transform class of this package, in the order of application (stage, then
    name).
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return tuple(sorted(Transform.__subclasses__(), key=lambda t: (STAGES.index(t.stage), t.name)))
