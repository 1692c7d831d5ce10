"""A checkpoint of two ranks with EP2 is resumed by four with EP4 and by one process; and one that is killed in a save.

Two ranks train two steps of RL with Muon, save in the background, and go on for three steps. Four ranks and one process
read the checkpoint and do the same three. Figures: `worst_norm`, the largest relative difference of a gradient's norm.
Then two ranks are killed (SIGKILL) while the next checkpoint is being written: the one before must be taken, and said.

    moe-rl bench reshard
"""
import copy
import os
import signal
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from _learning import rollouts, settings
from mesh_parity import BALANCE
from moe_rl.data.batch import micro_batches
from moe_rl.ep.ranks import run_ranks
from moe_rl.moe.experts import grouped_experts
from moe_rl.moe.model import moe_modules
from moe_rl.records import sampling_of
from moe_rl.rl.loss import resolve
from moe_rl.rl.trainer import Recipe, build_model, rl_loss
from moe_rl.scale.distcheckpoint import Saver, restore, resumable
from moe_rl.scale.parallel import Layout, parallelise
from moe_rl.train.optim import build_optimizer
from moe_rl.train.step import optimizer_step


class Job:
    "A trainer on this rank's mesh."
    def __init__(self, layout, model, s, texts):
        self.model = copy.deepcopy(model)
        self.mesh, self.texts, self.layout = parallelise(self.model, layout), texts, layout
        how = Recipe(resolve(s.rl.loss, **s.rl.loss_params), sampling_of(s.engine), BALANCE, context=self.mesh.context)
        self.loss = lambda model, b: rl_loss(model, b, how)
        self.opt = build_optimizer(self.model, 1e-2, 1e-3, parameters=self.mesh.parameters(self.model),
            muon=self.mesh.muon)

    def steps(self, numbers):
        "Norms of the gradients of these steps, each with rollouts of its own."
        norms = []
        for i in numbers:
            batches = micro_batches(*self.texts[i], 96, ranks=self.layout.data)
            norms.append(optimizer_step(self.model, self.opt, batches, self.loss, BALANCE, 1., self.mesh).grad_norm)
        return norms


def first(run_dir, *given):
    "Two steps, a save beside the third, three steps in all."
    job = Job(Layout(shard=2, experts=2), *given)
    job.steps(range(2))
    saver = Saver(run_dir, job.mesh)
    saver.begin(2, job.model, job.opt, dict(step=2))
    norms = job.steps(range(2, 5))
    saver.finish()
    return norms


def again(layout, run_dir, *given):
    job = Job(layout, *given)
    step = restore(resumable(run_dir)[0], job.model, job.opt, job.mesh)["step"]
    return job.steps(range(step, step+3))


def killed(run_dir, *given):
    "Begins to save step 3, and is killed before it is done."
    job = Job(Layout(shard=2, experts=2), *given)
    saver = Saver(run_dir, job.mesh)
    saver.begin(3, job.model, job.opt)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def measure(args):
    s = settings()
    model = build_model(s, 64)
    for m in moe_modules(model): m.experts.compute = grouped_experts
    texts = [(rollouts(model, 12, seed), torch.linspace(-1, 1.2, 12).tolist()) for seed in range(5)]
    with tempfile.TemporaryDirectory() as run_dir:
        began = time.time()
        want = run_ranks(first, 2, run_dir, model, s, texts, timeout=300.)[0]
        four = run_ranks(again, 4, Layout(shard=4, experts=4), run_dir, model, s, texts, timeout=300.)[0]
        one = again(Layout(), run_dir, model, s, texts)
        print(f"norms: 2 ranks {want}, 4 ranks {four}, one {one}; {time.time()-began:.0f} s", flush=True)
        ends = run_ranks(killed, 2, run_dir, model, s, texts, timeout=300., errors=True)
        if not all("died without an answer (exit code -9)" in str(e) for e in ends): raise AssertionError(ends)
        folder, said = resumable(run_dir)
        print(said, sorted(p.name for p in (Path(run_dir)/"checkpoints").iterdir()), flush=True)
        if folder.name != "step_2" or "step 3 was not finished" not in said: raise AssertionError(said)
        if again(Layout(), run_dir, model, s, texts) != one: raise AssertionError("the checkpoint before has changed")
    worst = max(abs(a/b-1) for got in (four, one) for a, b in zip(got, want))
    return dict(figures=dict(worst_norm=worst, killed_uses_previous=True), said=said)
