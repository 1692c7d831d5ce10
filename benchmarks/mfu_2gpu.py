"""Two GPUs, FSDP2 x EP2, one sequence a GPU, against one GPU: whole optimizer steps, both in this call.

The model and the single GPU are those of part b of the bench `mfu`: AFMoE with float32 masters, AdamW. On two GPUs the
matrices of attention, dense block, shared expert, embedding and head are sharded in float32 over both and gathered in
bf16, block by block; each rank holds half of the experts. Each side trains its router 200 steps before it is timed.
`--layers` changes the depth of both sides; `--tiny` runs the same code with gloo on two CPU processes, at a size that
says nothing about speed.

    moe-rl bench mfu_2gpu [--layers N] [--dispatch all_to_all,deepep] [--beside COMMAND] [--tiny]
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mfu
import torch
from _ranks import join_ranks, start_ranks
from mfu import BF16, RATE, ROUTER_STEPS, SHORT, T, V, language, profile, sizes, timed
from moe_rl.bench import NeedsHardware


def float_model(layers, device, tiny):
    "The model of part b with its weights in float32, the same on every rank."
    if not tiny:
        model = mfu.build(layers, True, True)
        for p in model.parameters(): p.data = p.data.float()
        return model
    from moe_rl.moe.families import new_afmoe
    from moe_rl.moe.model import Model, init_weights
    return init_weights(Model(new_afmoe(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2, sliding_window=8)), 0)


def batches(model, seeds, tokens, ranks, vocabulary, device):
    "One micro-batch of one document for each seed; `ranks` of them make a step."
    from moe_rl.gpu.step import Batch, documents
    docs, out = documents([tokens], model), []
    for seed in seeds:
        ids = (language(tokens+1, seed) % vocabulary).to(device)
        out.append(Batch(ids[:-1].contiguous(), ids[1:].contiguous(),
            torch.full((tokens,), 1/(tokens*ranks), device=device), docs))
    return out


def rank(given):
    from moe_rl.gpu.fused import fused_experts
    from moe_rl.gpu.optimizers import fused_optimizers
    from moe_rl.gpu.step import FusedModel, FusedStep
    from moe_rl.scale.parallel import Layout, parallelise
    from moe_rl.train.optim import lr_schedule
    from functools import partial
    tiny, device = given["tiny"], join_ranks("cpu" if given["tiny"] else "cuda")
    model = float_model(given["layers"], device, tiny)
    mesh = parallelise(model, Layout(**given["layout"]), torch.float32 if tiny else BF16, ends=True,
        dispatch=given["dispatch"], keep=True)
    opt = fused_optimizers(model, "adamw", adamw_lr=1e-3, parameters=mesh.parameters(model), products="torch")
    compute = partial(fused_experts, backend="plain") if tiny else fused_experts
    fused = FusedModel(model, mesh.spread(compute), "plain" if tiny else "flash4",
        dtype=None if tiny else BF16)
    step = FusedStep(fused, opt, RATE, mesh)
    steps, short, long, vocabulary = (2, 4, 6, 64) if tiny else (ROUTER_STEPS, SHORT, T, V)
    began, losses = time.time(), []
    for i in range(steps):
        opt.set_lr_scale(scale := lr_schedule(i, warmup=20, total=steps, floor=.01))
        step.balance = RATE*max(scale, .02)
        losses.append(float(step(batches(model, [1+2*i+mesh.rank], short, mesh.ranks, vocabulary, device)))
            if i in (0, steps-1) else step(batches(model, [1+2*i+mesh.rank], short, mesh.ranks, vocabulary, device)))
    if mesh.first:
        print(f"{given['dispatch']}: {steps} steps in {time.time()-began:.1f} s, loss {losses[0]:.3f} -> "
              f"{losses[-1]:.3f}", flush=True)
    work = batches(model, [1000+mesh.rank], long, mesh.ranks, vocabulary, device)
    if tiny: return dict(loss=float(step(work)), losses=[losses[0], losses[-1]])
    result = timed(lambda: step(work))
    result |= dict(tokens_per_s=T*mesh.ranks/result["ms"]*1e3, loss=float(step(work)))
    result["profile"] = profile(lambda: step(work), sizes(model.spec))
    return result


def on_gpu(i):
    "The environment of a process that sees the `i`-th of our GPUs alone."
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    return dict(os.environ, CUDA_VISIBLE_DEVICES=mine[i])


def measure(args):
    p = argparse.ArgumentParser("mfu_2gpu")
    p.add_argument("--layers", type=int, default=0)
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--dispatch", default="all_to_all")
    p.add_argument("--beside", default="", help="a command that runs on the second GPU while the first is measured")
    a = p.parse_args(args)
    layout = dict(shard=2, experts=2)
    if a.tiny:
        from_two = start_ranks(__file__, 2, "mesh", dict(tiny=True, layers=2, layout=layout, dispatch="all_to_all"))
        return dict(figures={}, tiny=from_two)
    if torch.cuda.device_count() < 2 or torch.cuda.get_device_capability()[0] != 9:
        raise NeedsHardware("two H100 or H200 of one host")
    layers = a.layers or (12 if torch.cuda.get_device_properties(0).total_memory > 100*2**30 else 8)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)/"b.json"
        beside = subprocess.Popen(a.beside, shell=True, env=on_gpu(1)) if a.beside else None
        subprocess.run([sys.executable, mfu.__file__, "b", str(layers), folder, str(out)], check=True, env=on_gpu(0))
        if beside: print(f"the command beside ended with code {beside.wait()}", flush=True)
        one = json.loads(out.read_text())
    print(f"one GPU: {one['ms']:.1f} ms, {one['tokens_per_s']:.0f} tokens/s, {one['gib']:.1f} GiB", flush=True)
    two = {}
    for dispatch in a.dispatch.split(","):
        try: r = two[dispatch] = start_ranks(__file__, 2, "mesh", dict(tiny=False, layers=layers, layout=layout,
            dispatch=dispatch))
        except RuntimeError as e:
            print(f"{dispatch}: {e}", flush=True)
            continue
        print(f"two GPUs, {dispatch}: {r['ms']:.1f} ms ({r['host_ms']:.1f} on the host), {r['tokens_per_s']:.0f} "
              f"tokens/s, {r['gib']:.1f} GiB a GPU, speed-up {r['tokens_per_s']/one['tokens_per_s']:.3f}", flush=True)
        print("   " + ", ".join(f"{k} {v:.1f}" for k, v in r["profile"]["groups"].items()))
        for k, v in list(r["profile"]["kernels"].items())[:24]: print(f"      {v:7.2f}  {k}")
    if not two: raise RuntimeError("mfu_2gpu: no exchange ran on two GPUs")
    best = max(two, key=lambda d: two[d]["tokens_per_s"])
    figures = dict(speedup=two[best]["tokens_per_s"]/one["tokens_per_s"], tokens_per_s=two[best]["tokens_per_s"],
        one_tokens_per_s=one["tokens_per_s"], gib=two[best]["gib"], one_gib=one["gib"], layers=layers)
    figures |= {f"speedup_{d}": r["tokens_per_s"]/one["tokens_per_s"] for d, r in two.items()}
    return dict(figures=figures, dispatch=best, one=one, two=two)


if __name__ == "__main__":
    part, given, out = sys.argv[1:]
    result = rank(json.loads(given))
    import torch.distributed as dist
    dist.barrier()
    if dist.get_rank() == 0: Path(out).write_text(json.dumps(result))
    dist.destroy_process_group()
