"""A step of RL on meshes of 1, 2 and 4 ranks (gloo, float32) against one process: loss, gradients, updates, biases.

The model is a small AFMoE with a window, a shared expert and SMEBU; the texts are rollouts that an engine sampled, with
their routes; the loss has all regularisers. On every layout:

    worst_loss    relative difference of the loss, regularisers included
    worst_grad    largest difference of a gradient over its largest value, worst parameter
    worst_param   L2 of the difference of two steps' update over L2 of the update: AdamW (lr 1e-3) and Muon, worst
                  parameter
    counts, biases and momenta must be equal, the clipped norm agree, and Muon orthogonalise each matrix once

    moe-rl bench mesh_parity [--only NAME]
"""
import argparse
import copy
import time

import torch
from _learning import rollouts, settings
from moe_rl.config import BalanceSection
from moe_rl.data.batch import micro_batches
from moe_rl.ep.ranks import run_ranks
from moe_rl.moe.experts import grouped_experts
from moe_rl.moe.model import moe_modules
from moe_rl.records import sampling_of
from moe_rl.rl.loss import resolve
from moe_rl.rl.trainer import Recipe, build_model, rl_loss
from moe_rl.scale.parallel import Layout, parallelise
from moe_rl.train.optim import Optimizers, build_optimizer
from moe_rl.train.step import _gradients, optimizer_step

BALANCE = BalanceSection(rule="smebu", aux_coef=1e-2, z_coef=1e-3, head_z_coef=1e-3)
LAYOUTS = { # name: layout, what is computed again, rollouts
    "1": (Layout(), "none", 12),
    "1, layers again": (Layout(), "layers", 12),
    "FSDP 2": (Layout(shard=2), "none", 12),
    "HSDP 2x1": (Layout(replicate=2), "blocks", 12),
    "CP 2": (Layout(context=2), "layers", 12),
    "EP 2": (Layout(shard=2, experts=2), "blocks", 12),
    "CP 2 x EP 2 on 2 ranks": (Layout(context=2, experts=2), "layers", 12),
    "FSDP 4": (Layout(shard=4), "layers", 12),
    "FSDP 4, one rank without texts": (Layout(shard=4, experts=2), "layers", 3),
    "HSDP 2x2": (Layout(replicate=2, shard=2), "layers", 12),
    "HSDP 2x2, EP 2": (Layout(replicate=2, shard=2, experts=2), "none", 12),
    "EP 4": (Layout(shard=4, experts=4), "layers", 12),
    "CP 2 x EP 2": (Layout(shard=2, context=2, experts=2), "layers", 12),
    "CP 4": (Layout(context=4), "blocks", 12),
    "CP 2 x EP 4": (Layout(shard=2, context=2, experts=4), "blocks", 12),
}


def adamw(model, parameters):
    "AdamW for everything."
    opt = torch.optim.AdamW(list(parameters.values()), 1e-3, (.9, .95), weight_decay=0.)
    return Optimizers(None, opt, {p: n for n, p in parameters.items()})


def work(layout, again, texts, model, s):
    "What this rank says of a step, everything whole again."
    from moe_rl.scale.parallel import forget
    sampling, policy = sampling_of(s.engine), resolve(s.rl.loss, **s.rl.loss_params)
    batches = micro_batches(*texts, 96, ranks=layout.data, pad_multiple=2*layout.context)
    out = {}
    for name in ("gradients", "adamw", "muon"):
        m = copy.deepcopy(model)
        mesh = parallelise(m, layout, again=again)
        if layout.ranks == 1: forget(m, again)
        how = Recipe(policy, sampling, BALANCE, context=mesh.context)
        loss = lambda model, b: rl_loss(model, b, how)
        parameters = mesh.parameters(m)
        opt = adamw(m, parameters) if name != "muon" else build_optimizer(m, 1e-2, 1e-3, parameters=parameters,
            muon=mesh.muon)
        if name == "gradients":
            parts, _, counts, _ = _gradients(m, opt, batches, loss, mesh, lambda doing: None)
            norm = mesh.norm(opt.params)
            grads = mesh.gather({n: p.grad for n, p in parameters.items() if p.grad is not None})
            out |= dict(loss=float(sum(parts.values())), counts=counts, norm=norm, grads=grads)
            continue
        reports = [optimizer_step(m, opt, batches, loss, BALANCE, 1., mesh) for _ in range(2)]
        state = mesh.gather(m.state_dict())
        out[name] = {n: state[n] for n in parameters}
        out[f"{name} norms"] = [r.grad_norm for r in reports]
        out[f"{name} biases"] = [t for x in moe_modules(m) for t in (x.expert_bias.clone(), x.bias_momentum.clone())]
        out[f"{name} counts"] = [r.counts for r in reports]
        if name == "muon": out["matrices"] = getattr(opt.all[0], "matrices", 0)
    return out


def compare(got, want, before):
    "Differences of one rank's answer from the one of a single process."
    grad = lambda n: float((got["grads"][n]-want["grads"][n]).abs().max()/want["grads"][n].abs().max())
    length = lambda t: float(t.detach().norm())
    moved = lambda k, n: length(got[k][n]-want[k][n])/length(want[k][n]-before[n])
    if got["grads"].keys() != want["grads"].keys(): raise AssertionError("other parameters have gradients")
    for k in ("adamw", "muon"):
        for a, b in zip(got[f"{k} biases"]+got[f"{k} counts"], want[f"{k} biases"]+want[f"{k} counts"]):
            if not torch.equal(a, b): raise AssertionError(f"{k}: biases, momenta or counts differ")
        for a, b in zip(got[f"{k} norms"], want[f"{k} norms"]):
            if abs(a/b-1) > 1e-4: raise AssertionError(f"{k}: norm {a} instead of {b}")
    if not torch.equal(got["counts"], want["counts"]): raise AssertionError("counts differ")
    off = lambda k: abs(got[k]/want[k]-1)
    return dict(loss=off("loss"), grad=max(map(grad, want["grads"])), norm=off("norm"),
        adamw=max(moved("adamw", n) for n in want["adamw"]), muon=max(moved("muon", n) for n in want["muon"]))


def measure(args):
    p = argparse.ArgumentParser("mesh_parity")
    p.add_argument("--only", default="")
    a = p.parse_args(args)
    s = settings()
    model = build_model(s, 64)
    for m in moe_modules(model): m.experts.compute = grouped_experts
    given = rollouts(model, 12, 0)
    advantages = torch.linspace(-1, 1.2, 12).tolist()
    rows, wants = {}, {}
    for name, (layout, again, n) in LAYOUTS.items():
        if a.only and a.only != name: continue
        texts, began = (given[:n], advantages[:n]), time.time()
        if n not in wants: wants[n] = work(Layout(), "none", texts, model, s)
        answers = run_ranks(work, layout.ranks, layout, again, texts, model, s, timeout=300.)
        before = dict(model.named_parameters())
        found = [compare(got, wants[n], before) for got in answers]
        rows[name] = {k: max(f[k] for f in found) for k in found[0]}
        if layout.ranks > 1:
            total = sum(got["matrices"] for got in answers)
            if total != (need := 2*matrices_of(model)): raise AssertionError(f"Muon: {total} matrices, not {need}")
        print(f"{name:32} {again:7}" + "".join(f" {k} {v:.1e}" for k, v in rows[name].items())
            + f"  {time.time()-began:.0f} s", flush=True)
    worst = lambda k: max(r[k] for r in rows.values())
    figures = dict(worst_loss=worst("loss"), worst_grad=worst("grad"), worst_param=max(worst("adamw"), worst("muon")),
        layouts=len(rows))
    return dict(figures=figures, rows=rows)


def matrices_of(model):
    "How many matrices Muon moves in a step."
    from moe_rl.train.optim import matrices, optimiser_of
    kinds = {n: optimiser_of(model.spec, n) for n, _ in model.named_parameters()}
    return sum(len(matrices(p, kinds[n][1])) for n, p in model.named_parameters() if kinds[n][0] == "muon")
