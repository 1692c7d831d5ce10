"""A bfloat16 and a float32 folder that hold the same values are the same start: what is trained is float32, whatever a
file stores.

    moe-rl bench bf16_start [--steps 10]

Both are trained on the same recorded batches, at learning rates that are usual for RL on a pretrained model.
`moved_share` is the share of matrix entries that moved; beside it, what would be left of the same
movement if the weights themselves were kept in bfloat16.
"""
import argparse
from pathlib import Path
import torch
from _learning import VOCABULARY, batches, settings, trainer
from _runs import folders
from moe_rl.bench import repository
from moe_rl.moe.checkpoint import save_pretrained
from moe_rl.moe.model import lower_precision
from moe_rl.rl.trainer import build_model


def matrices(t) -> dict:
    "The weights of a trainer that are matrices."
    return {k: v.detach().clone() for k, v in t.model.named_parameters() if v.ndim > 1}


def learn(folder: Path, recorded: list) -> tuple[dict, dict]:
    "Matrices before and after training from a folder."
    s = settings(**{"model.checkpoint": str(folder), "optim.muon_lr": 4e-6, "optim.adamw_lr": 1e-6})
    t = trainer(build_model(s, VOCABULARY), s)
    before = matrices(t)
    for b in recorded: t.step(b)
    return before, matrices(t)


def movement(before: dict, after: dict) -> tuple[float, float]:
    "Share of entries that differ, and the length of the difference."
    n = sum(v.numel() for v in before.values())
    return sum(int((after[k] != before[k]).sum()) for k in before)/n, sum(float((after[k]
        - before[k]).double().square().sum()) for k in before)**.5


def measure(args: list[str]) -> dict:
    "`moe-rl bench bf16_start`; see the module's docstring."
    p = argparse.ArgumentParser(prog="moe-rl bench bf16_start")
    p.add_argument("--steps", type=int, default=10)
    a = p.parse_args(args)
    out = folders(repository(), "bf16_start")
    start = lower_precision(build_model(settings(), VOCABULARY), torch.bfloat16)
    save_pretrained(start, out / "bf16")
    save_pretrained(start.float(), out / "float32")
    recorded = batches(start, a.steps, lambda n: [1., -1.]*(n//2))
    got = {name: learn(out / name, recorded) for name in ("bf16", "float32")}
    moves = {name: movement(*g) for name, g in got.items()}
    before, after = got["bf16"]
    kept = movement(before, {k: v.bfloat16().float() for k, v in after.items()})
    for name, (share, size) in (*moves.items(), ("kept in bf16", kept)):
        print(f"{name:>12}: {share:7.2%} of the entries moved, by {size:.3e} in all", flush=True)
    apart = movement(got["bf16"][1], got["float32"][1])[1]
    return dict(figures=dict(moved_share=moves["bf16"][0], moved_share_float32=moves["float32"][0],
                             share_ratio=moves["bf16"][0]/moves["float32"][0],
                             size_ratio=moves["bf16"][1]/moves["float32"][1], difference=apart/moves["float32"][1],
                             moved_share_kept_in_bf16=kept[0], steps=a.steps))
