"""Stop points for `moe-rl bench chaos`, loaded by every process of its runs: an armed point holds its process for a
moment, so that a signal hits exactly there.

MOE_CHAOS names a folder. `arm.POINT` in it arms a point; the process that comes by takes it away, leaves
`reached.POINT` and waits. Engines load for MOE_CHAOS_LOADING seconds."""
import importlib.abc, importlib.machinery, os, sys, time
from pathlib import Path

FOLDER = Path(os.environ.get("MOE_CHAOS", "/nowhere"))


def point(name):
    "Wait here when this point is armed."
    try: (FOLDER / f"arm.{name}").rename(FOLDER / f"reached.{name}")
    except OSError: return
    time.sleep(6)


def before(module, attribute, act):
    "Call `act` with the arguments of every call of `module.attribute`, before it."
    inner = getattr(module, attribute)
    def outer(*args, **kwargs):
        act(*args, **kwargs)
        return inner(*args, **kwargs)
    setattr(module, attribute, outer)


def weights(m):
    def writes(path, *args, **kwargs):
        aside = Path(path).parent.name
        if aside.startswith(".v"): point("publication")
        elif aside.startswith(".step_") and not aside.startswith(".step_0."): point("saving")
    before(m, "save_tensors", writes)


def loads(*args, **kwargs):
    if "engine" in sys.orig_argv: time.sleep(float(os.environ.get("MOE_CHAOS_LOADING", 0)))


HOOKS = {"moe_rl.train.weights": weights,
         "moe_rl.train.checkpoint": lambda m: before(m, "_mark", lambda *a: point("commit")),
         "moe_rl.train.sft": lambda m: before(m, "index_batches", lambda *a, **k: point("warm_start")),
         "moe_rl.rl.ask": lambda m: (before(m, "engine_plan", loads),
             before(m, "grade", lambda *a: point("evaluation"))),
         "moe_rl.moe.checkpoint": lambda m: before(m, "save_pretrained", lambda *a, **k: point("end"))}


class Finder(importlib.abc.MetaPathFinder):
    "Finds the modules above as everybody does, and has them changed once they are there."
    def find_spec(self, name, path=None, target=None):
        if name not in HOOKS: return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            HOOKS[name](module)
        spec.loader.exec_module = exec_module
        return spec


if FOLDER.is_dir(): sys.meta_path.insert(0, Finder())
