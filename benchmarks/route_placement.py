"""Experts placed for the batch whose routes are recorded, beside experts placed for the batches before it, on batches
of a trained model.

    moe-rl bench route_placement [--steps 300] [--history 64] [--batches 64]

The model is that of `moe-rl bench expert_profile`: 64 experts, a token takes 8, trained on code, maths and prose with
SMEBU. A batch is what a step of RL with few problems looks like: eight groups, each of four rows cut
from one place of one text (32 rows of 256 tokens), held out from training. 8 to 64 GPUs, 8 to a node, are simulated
from the recorded routes: balance is the mean over the fullest GPU's load, mean over layers and batches.
`behind`: planned from the last `history` batches. `shares`: the same slots, shared for the batch. `few`: a tenth of the
slots moved. `ahead`: placed for the batch. The figures that the name ends with 64 are for 64 GPUs;
`balance_before` and `balance_after` are the least favourable of `behind` and `ahead` over all numbers of GPUs. The time
of a step on real GPUs is not measured here: `load_ratio` is what the fullest GPU gains."""
import argparse, sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from expert_profile import CFG, LENGTH, Trained

from moe_rl.ep.foresight import compare_ways
from moe_rl.ep.profile import count_routes


def group(trained:Trained, rng:np.random.Generator, rows:int)->torch.Tensor: # [rows,LENGTH+1]
    "Rows from one place of one text, as the answers to one problem are alike."
    t = trained.texts[rng.choice(list(trained.texts))]
    at = rng.integers(len(t)*9//10, len(t) - 2*LENGTH - 2)
    return torch.stack([t[i:i+LENGTH+1] for i in at + rng.integers(0, LENGTH, rows)])


def measure(args:list[str])->dict:
    p = argparse.ArgumentParser("route_placement")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--history", type=int, default=64)
    p.add_argument("--batches", type=int, default=64)
    a = p.parse_args(args)
    trained, rng, counts = Trained(a.steps), np.random.default_rng(0), []
    with torch.no_grad():
        for _ in range(a.history + a.batches):
            out, _ = trained.forward(torch.cat([group(trained, rng, 4) for _ in range(8)]))
            counts.append(count_routes(out.routes.numpy(), CFG.num_experts))
    counts, E, figures = np.stack(counts), CFG.num_experts, {}
    print(f"{len(counts)} batches of {counts[0,0].sum()//CFG.num_experts_per_tok} tokens recorded\n  GPUs  slots  way "
          "     balance  worst batch  slots moved")
    for gpus in (8, 16, 32, 64):
        nodes, slots = gpus//8, -(-max(2*gpus, E*5//4)//gpus)*gpus
        for o in compare_ways(counts, a.history, slots, CFG.n_group, nodes, gpus):
            print(f"{gpus:6d} {slots:6d}  {o.way:8s} {o.balance:.4f}   {o.worst:.4f}      {o.moved:.3f}", flush=True)
            figures.update({f"{o.way}_{gpus}": o.balance, f"{o.way}_moved_{gpus}": o.moved})
    before, after = (min(figures[f"{w}_{g}"] for g in (8, 16, 32, 64)) for w in ("behind", "ahead"))
    figures.update(balance_before=before, balance_after=after, load_ratio=round(after/before, 4))
    return dict(figures=figures)
