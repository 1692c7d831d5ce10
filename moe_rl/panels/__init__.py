"""Panels for a notebook. Each is imported when it is first asked for; only a panel that is shown needs `ipywidgets`."""
_FROM = dict(Routing="routing", Balance="balance", Eight="fp8", Traffic="traffic", Placing="placement",
             Packing="packing", Schedule="schedule", Cache="kv", Loss="loss", Live="live", Compare="compare")
__all__ = list(_FROM)

def __getattr__(name):
    if name not in _FROM:
        raise AttributeError(f"module 'moe_rl.panels' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f"moe_rl.panels.{_FROM[name]}"), name)
    return value

def __dir__(): return sorted({*globals(), *__all__})
