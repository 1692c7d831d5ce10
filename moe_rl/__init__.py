"""Mixture-of-Experts language models that learn by asynchronous reinforcement learning.

The ten names that a user needs; each is imported when it is first asked for, so that `import moe_rl` costs nothing."""
__version__ = "0.1.0"

_FROM = dict(Settings="config", load_settings="config", run="rl.run", evaluate="rl.run",
             Environment="rollout.environments", Task="rollout.environments",
             load_pretrained="moe.checkpoint", save_pretrained="moe.checkpoint", load_tokenizer="data.tokens",
             write_report="report")
__all__ = list(_FROM)

def __getattr__(name):
    if name not in _FROM:
        raise AttributeError(f"module 'moe_rl' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f"moe_rl.{_FROM[name]}"), name)
    return value

def __dir__(): return sorted({*globals(), *__all__})
