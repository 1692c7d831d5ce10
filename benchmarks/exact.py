"""The main job in exact mode, asynchronous and with weights in flight, in float32 and in bf16: every token that its
engines sampled is computed again with the weights that sampled it, by what a trainer calls. And what it costs."""
import argparse, os, statistics, sys, time
from collections import defaultdict
from pathlib import Path
import numpy as np
import torch
from _runs import Run, finish, folders
from _witness import FOLDER, PACK, audit, testimony
from moe_rl.bench import NeedsHardware, repository
from moe_rl.config import load_settings
from moe_rl.data.tokens import load_tokenizer
from moe_rl.moe.attention import packed_attend
from moe_rl.moe.model import Model
from moe_rl.rl.trainer import spec_of
from moe_rl.rollout.engine import Engine, plain_step
from moe_rl.rollout.exact import ExactStep, mismatches
from moe_rl.rollout.protocol import step_of
from moe_rl.train.precision import logprobs_of, working
from moe_rl.train.weights import load_version, versions

TYPES = dict(float32="float32", bf16="bfloat16") # train.precision -> engine.dtype


def settings(a, precision: str) -> dict:
    return {"rl.steps": a.steps, "rl.seconds": 0, "rl.stop_at": 0, "rl.reward": "score", "rl.max_staleness": 2,
        "warm_start.steps": a.warm, "eval.prompts": 32, "eval.every": 0, "checkpoint.every": 0,
        "schedule.device": a.device, "train.precision": precision, "train.forward": "exact",
        "engine.dtype": TYPES[precision], "engine.kv": "recompute",
        "engine.kind": "_witness:witness", "engine.kv_tokens": a.kv, "engine.max_seqs": 64}


class Weights:
    "The model of a run, with the weights of any version that its engines had."
    def __init__(self, run: Path, device: str):
        s = load_settings(run / "config.toml")
        self.run, self.precision = run, s.train.precision
        self.model = Model(spec_of(s, load_tokenizer(run / "tokenizer").vocab_size)).to(device).requires_grad_(False)

    def __call__(self, version: int) -> Model:
        self.model.load_state_dict(load_version(self.run / FOLDER, version)[0])
        return self.model


def witnessed(run: Path, weights: Weights) -> dict:
    "All that the engines of a run have answered, held against its weights."
    played = [(seen.request, seen.finished) for seen in testimony(run)]
    off = audit(played, weights, lambda model: working(model, weights.precision, "exact", "auto"))
    mixed = sum(len(set(f.versions.tolist())) > 1 for _, f in played)
    return dict(mismatch=max(off), tokens=sum(len(f.token_ids) for _, f in played), answers=len(played),
        versions=len(versions(run / FOLDER)), mixed=mixed)


def sample(model: Model, compute, dtype: str, asked: list, kv: int) -> tuple[list, float]: # answers, tokens/s
    engine = Engine(model, kv_tokens=kv, max_seqs=64, compute=compute, kv_update="recompute",
        dtype=None if dtype == "float32" else getattr(torch, dtype))
    done, started = {}, time.perf_counter()
    for r in asked: engine.add(r)
    while engine.has_work: done |= {f.id: f for f in engine.step()}
    seconds = time.perf_counter() - started
    return [(r, done[r.id]) for r in asked], sum(len(f.token_ids) for f in done.values()) / seconds


def train_rate(work, played: list) -> float: # tokens/s of a forward and a backward pass
    "As a trainer would, without an optimizer."
    texts = [torch.tensor([*r.prompt, *f.token_ids]) for r, f in played]
    device, started = work.lm_head.weight.device, time.perf_counter()
    ids, cu = torch.cat(texts).to(device), torch.tensor([0, *np.cumsum([len(t) for t in texts])], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(t)) for t in texts]).to(device)
    out = work(ids, positions, packed_attend(cu.to(device)))
    logprobs_of(work)(out.hidden[:-1], work.lm_head.weight, ids[1:])[0].mean().backward()
    if device.type == "cuda": torch.cuda.synchronize()
    return len(ids) / (time.perf_counter() - started)


def costs(run: Path, weights: Weights, a) -> dict:
    "The ordinary step and the exact one on the same requests, in turn; the last version's weights."
    newest, precision = versions(run / FOLDER)[-1], weights.precision
    dtype, asked = TYPES[precision], [s.request for s in testimony(run) if s.request.lane == "train"][-a.requests:]
    rates, ordinary = defaultdict(list), 0.
    for _ in range(a.rounds + 1):       # the first is for warming up
        steps = dict(ordinary=step_of("auto", weights.model), plain=plain_step, exact=ExactStep())
        for name, compute in steps.items():
            state, _ = load_version(run / FOLDER, newest)
            model = Model(weights.model.spec).to(a.device).requires_grad_(False)
            model.load_state_dict(state)
            played, rate = sample(model, compute, dtype, asked, a.kv)
            rates[name].append(rate)
            if name != "ordinary": continue
            work = working(weights(newest), precision, "auto", "auto")
            ordinary = max(ordinary, max(mismatches(work, played[i:i + PACK]).max().item()
                for i in range(0, len(played), PACK)))
        for forward in ("auto", "exact"):
            learner = weights(newest).requires_grad_(True)
            rates[f"train_{forward}"].append(train_rate(working(learner, precision, forward, "auto"), played))
            learner.requires_grad_(False).zero_grad()
    # of each round: what else the machine does changes between them
    ratio = lambda a, b: statistics.median(x / y for x, y in list(zip(rates[a], rates[b]))[1:])
    return dict(mismatch_ordinary=ordinary, slowdown=ratio("ordinary", "exact"), slowdown_plain=ratio("plain", "exact"),
        train_slowdown=ratio("train_auto", "train_exact"), tokens_per_s=statistics.median(rates["exact"][1:]))


def one(a, out: Path, precision: str) -> dict:
    folder = out / precision
    words = [w for k, v in settings(a, precision).items() for w in (f"--{k}", str(v))]
    config = str(repository() / "configs" / "main_job.toml")
    run = finish(Run(folder, "--config", config, "--dir", str(folder), *words), 1500)
    weights = Weights(folder, a.device)
    found = witnessed(folder, weights) | dict(steps=len(run.metrics)) | costs(folder, weights, a)
    said = ", ".join(f"{k} {v:.3g}" for k, v in found.items())
    print(f"{precision}: {said}", flush=True)
    return found


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench exact")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--only", choices=list(TYPES), default="")
    p.add_argument("--steps", type=int, default=12, help="of RL")
    p.add_argument("--warm", type=int, default=20, help="supervised steps before")
    p.add_argument("--kv", type=int, default=1536, help="tokens of a cache: so few that requests are preempted")
    p.add_argument("--requests", type=int, default=192, help="of one timing")
    p.add_argument("--rounds", type=int, default=5, help="of timing; medians are reported")
    a = p.parse_args(args)
    if a.device == "cuda" and not torch.cuda.is_available(): raise NeedsHardware("a GPU")
    torch.set_num_threads(1)
    here = str(Path(__file__).parent)   # where a run finds its witness
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    sys.path.insert(0, here)
    figures, out = {}, folders(repository(), "exact")
    for precision in [a.only] if a.only else TYPES:
        found = one(a, out, precision)
        figures |= {k if precision == "float32" else f"{k}_bf16": v for k, v in found.items()}
    return dict(figures=figures, device=a.device)
