"""One sequence of 131072 tokens: an AFMoE of 8 layers trains on one GPU, and on two with CP2.

The model is that of the bench `mfu`, part b, with float32 masters and AdamW; every layer is computed again in the
backward pass. On two GPUs each computes a piece of the head and one of the tail of the text, layers with a window
exchange the keys that it reaches, the others all before; each GPU holds half of the experts. The loss before the first
step must be the same on both sides. The router trains some steps before anything is timed.

    moe-rl bench long_context [--tokens N] [--save FILE] [--one FILE] [--tiny]     # --save: one GPU alone, into FILE
"""
import argparse
import json
import time
from functools import partial
from pathlib import Path
import sys

import torch
from _ranks import join_ranks, start_ranks
from mfu import BF16, RATE, SHORT, V, language, timed
from mfu_2gpu import float_model
from moe_rl.bench import NeedsHardware

LAYERS, STEPS = 8, 60


def batch(model, seed, tokens, vocabulary, device, mesh, context):
    "One document; of it the rows of this rank."
    from moe_rl.gpu.pieces import angles
    from moe_rl.gpu.step import Batch, documents
    from moe_rl.scale.context import Shared, SharedDocuments, pieces
    ids = language(tokens+1, seed) % vocabulary
    if context == 1:
        docs, rows = documents([tokens], model), torch.arange(tokens)
    else:
        rows = torch.cat([torch.arange(p.start, p.stop) for p in pieces(tokens, context, mesh.context.place)])
        rope = next(l.rope for l in model.layers if l.rope is not None)
        cu = torch.tensor([0, tokens], device=device)
        docs = SharedDocuments(None, tokens, angles(rows.to(device), rope.dim, rope.theta), Shared(cu,
            mesh.context.group))
    x, y = ids[rows].contiguous().to(device), ids[rows+1].contiguous().to(device)
    return Batch(x, y, torch.full((len(rows),), 1/tokens, device=device), docs)


def rank(given):
    from moe_rl.gpu.fused import fused_experts
    from moe_rl.gpu.optimizers import fused_optimizers
    from moe_rl.gpu.step import ATTENTION, FusedModel, FusedStep
    from moe_rl.scale.context import shared_attention
    from moe_rl.scale.parallel import Layout, parallelise
    from moe_rl.train.optim import lr_schedule
    tiny, context = given["tiny"], given["context"]
    device = join_ranks("cpu" if tiny else "cuda")
    model = float_model(LAYERS, device, tiny)
    mesh = parallelise(model, Layout(context=context, experts=context), torch.float32 if tiny else BF16, ends=True,
        dispatch="all_to_all", keep=True)
    if context == 1 and not tiny:
        for n, p in model.named_parameters():
            if "norm" not in n and ".router." not in n: p.data = p.data.to(BF16)
    opt = fused_optimizers(model, "adamw", adamw_lr=1e-3, parameters=mesh.parameters(model))
    attend = ATTENTION["plain" if tiny else "flash4"]
    fused = FusedModel(model, mesh.spread(partial(fused_experts, backend="plain") if tiny else fused_experts),
        attend if context == 1 else shared_attention(attend), dtype=None if tiny else BF16, again=True)
    step = FusedStep(fused, opt, RATE, mesh)
    steps, short, tokens, vocabulary = (1, 16, 32, 64) if tiny else (STEPS, SHORT, given["tokens"], V)
    make = lambda seed, n: batch(model, seed, n, vocabulary, device, mesh, context)
    work, began = make(1000, tokens), time.time()
    with torch.no_grad(): before = float(mesh.sum(fused.loss(*work).loss))
    for i in range(steps):
        opt.set_lr_scale(scale := lr_schedule(i, warmup=10, total=steps, floor=.01))
        step.balance = RATE*max(scale, .02)
        step([make(i, short)])
    after = float(step([work]))
    if mesh.first:
        print(f"context {context}: loss {before:.5f} before {steps} steps of {short} tokens and {after:.5f} after; "
              f"{time.time()-began:.0f} s", flush=True)
    if tiny: return dict(before=before, after=after)
    result = timed(lambda: step([work]), repeats=4, settle=1)
    return result | dict(seconds=result["ms"]/1e3, before=before, after=after, tokens=tokens)


def measure(args):
    p = argparse.ArgumentParser("long_context")
    p.add_argument("--tokens", type=int, default=131072)
    p.add_argument("--save", default="")
    p.add_argument("--one", default="")
    p.add_argument("--tiny", action="store_true")
    a = p.parse_args(args)
    start = lambda context: start_ranks(__file__, context, f"context {context}", dict(tiny=a.tiny, tokens=a.tokens,
        context=context))
    if not a.tiny and (torch.cuda.device_count() < (1 if a.save else 2)
            or torch.cuda.get_device_capability()[0] != 9):
        raise NeedsHardware("two H100 or H200 of one host")
    one = json.loads(Path(a.one).read_text()) if a.one else start(1)
    if a.save:
        Path(a.save).write_text(json.dumps(one))
        return dict(figures=dict(tokens=a.tokens, gib=one["gib"], seconds=one["seconds"]))
    two = start(2)
    if a.tiny: return dict(figures={}, one=one, two=two)
    print(f"one GPU {one['seconds']:.2f} s, {one['gib']:.1f} GiB; two {two['seconds']:.2f} s, {two['gib']:.1f} GiB")
    if abs(two["before"]/one["before"]-1) > 1e-3: raise AssertionError("CP2 computes another loss")
    figures = dict(tokens=a.tokens, gib=one["gib"], seconds=one["seconds"], cp_gib=two["gib"],
        cp_seconds=two["seconds"], cp_speedup=one["seconds"]/two["seconds"])
    return dict(figures=figures, one=one, two=two)


if __name__ == "__main__":
    import torch.distributed as dist
    result = rank(json.loads(sys.argv[2]))
    dist.barrier()
    if dist.get_rank() == 0: Path(sys.argv[3]).write_text(json.dumps(result))
    dist.destroy_process_group()
