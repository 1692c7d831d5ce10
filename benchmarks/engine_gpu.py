"""The embedded engine and vLLM on one GPU: the same AFMoE of 0.3 billion parameters, the same 256 sequences, tokens a
second; what a new version costs each of them; and whether vLLM computes what the model does, before and after updates.

Each engine has a process of its own and is driven by the protocol, as a run drives it.

    moe-rl bench engine_gpu [--only embedded|vllm] [--tiny]         --tiny: on a CPU, at a size that says nothing
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gpu_road import ANSWER, PROMPT, SEATS, drive, requests
from moe_rl.bench import NeedsHardware


def plan_of(tiny):
    "The model of the bench `gpu_road`, and how it is served."
    from moe_rl.moe.families import new_afmoe
    from moe_rl.rollout.protocol import EnginePlan
    sizes = dict(hidden_size=768, intermediate_size=2048, moe_intermediate_size=384, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, num_experts=32, sliding_window=512,
        vocab_size=32768)
    if tiny: sizes |= dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=8, vocab_size=256)
    spec = new_afmoe(num_dense_layers=1, num_experts_per_tok=4, num_shared_experts=1, route_scale=2.,
        max_position_embeddings=4096, **sizes)
    seats = 4 if tiny else SEATS
    device, dtype = (torch.device("cpu"), torch.float32) if tiny else (torch.device("cuda"), torch.bfloat16)
    tokens = max(8192, seats*(PROMPT+ANSWER+16))
    return EnginePlan(spec, Path(tempfile.mkdtemp()), device, dtype, tokens, 16, seats, "keep", "auto", True, .25)


def engine_of(kind, plan):
    from moe_rl.rollout.protocol import engine_maker
    return engine_maker(kind, {})(plan)


@torch.no_grad()
def compared(model, asked, done):
    "Mean KL (k3) of the sampled tokens between engine and model, with the engine's routes and with the model's own."
    from moe_rl.moe.attention import packed_attend, packed_positions
    from moe_rl.train.objective import token_logprobs
    out = {}
    for name in ("kl_on", "kl_off"):
        logs, routes_equal = [], []
        for r in asked:
            f = done[r.id]
            ids = torch.tensor([*r.prompt, *f.token_ids], device=model.device)
            cu = torch.tensor([0, len(ids)-1], device=model.device)
            given = torch.from_numpy(f.routes.astype(np.int64)).to(model.device) if name == "kl_on" else None
            made = model(ids[:-1], packed_positions(cu), packed_attend(cu), given)
            mine = token_logprobs(made.hidden, model.lm_head.weight, ids[1:])[0][len(r.prompt)-1:].float().cpu().numpy()
            logs.append(mine-f.logprobs)
            routes_equal.append(float((np.sort(made.routes.cpu().numpy()) == np.sort(f.routes)).mean()))
        d = np.concatenate(logs)
        out[name] = float(np.mean(np.expm1(d)-d))
        out[f"worst_{name}"] = float(np.abs(d).max())
        out[f"routes_{name}"] = float(np.mean(routes_equal))
    return out


def stirred(model, seed):
    "Another version: every weight a little different."
    g = torch.Generator(device=model.device).manual_seed(seed)
    for t in model.state_dict().values():
        if t.is_floating_point():
            t.add_(torch.randn(t.shape, generator=g, device=t.device, dtype=t.dtype)*t.float().std().nan_to_num()*.05)


def one(kind, tiny):
    from moe_rl.moe.model import Model, init_weights, lower_precision
    from moe_rl.rollout.protocol import Folder, Held
    from moe_rl.train.weights import publish
    plan, out = plan_of(tiny), {}
    master = init_weights(Model(plan.spec), 0).requires_grad_(False).to(plan.device)
    began = time.perf_counter()
    engine = engine_of(kind, plan)
    out["start_s"] = time.perf_counter()-began
    folder, cost = plan.folder/"weights", []
    for v in range(1, 5):
        if v > 1: stirred(master, v)
        began = time.perf_counter()
        publish(folder, v, master.state_dict())
        published = time.perf_counter()
        engine.update(v, Folder(folder))
        cost.append((published-began, time.perf_counter()-published))
        direct = Held({v: master.state_dict()})
        began = time.perf_counter()
        engine.update(v, direct)
        cost[-1] += (time.perf_counter()-began,)
    for i, part in enumerate(("publish", "load_apply", "apply")):
        out[f"{part}_s"] = float(np.median([c[i] for c in cost[1:]]))
    print(f"{kind}: ready after {out['start_s']:.1f} s; a version: publish {out['publish_s']:.2f} s, load and apply "
          f"{out['load_apply_s']:.2f} s; out of memory {out['apply_s']:.2f} s", flush=True)
    n, vocab = plan.max_seqs, plan.spec.vocab_size
    drive(engine, requests(n, PROMPT, 8, seed=1, vocab=vocab))
    for label, many in (("full", n), ("waiting", 2*n)):
        asked = requests(many, PROMPT, 16 if tiny else ANSWER, seed=many, vocab=vocab)
        done, seconds, steps = drive(engine, asked)
        rate, step = sum(len(f.token_ids) for f in done.values())/seconds, float(np.median(steps))*1e3
        out |= {f"{label}_tokens_per_s": rate, f"{label}_step_ms": step}
        print(f"{kind}, {label}: {rate:.0f} tokens/s, median step {step:.2f} ms", flush=True)
    lower_precision(master, plan.dtype) if plan.dtype != torch.float32 else None
    asked = requests(8, PROMPT, 24, seed=9, vocab=vocab)
    for name in ("", "_updated"):
        if name:
            stirred(master, 77)
            engine.update(9, Held({9: master.state_dict()}))
        done, _, _ = drive(engine, asked)
        out |= {k+name: v for k, v in compared(master, asked, done).items()}
    print(f"{kind}: KL to the model {out['kl_off']:.2e}, with its routes {out['kl_on']:.2e} (worst |d| "
          f"{out['worst_kl_on']:.3f}); after an update {out['kl_off_updated']:.2e}, {out['kl_on_updated']:.2e}; routes "
          f"equal {out['routes_kl_off']:.4f}", flush=True)
    engine.close()
    shutil.rmtree(plan.folder, ignore_errors=True)
    return out


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench engine_gpu", description=__doc__)
    p.add_argument("--only", choices=["embedded", "vllm"], default="")
    p.add_argument("--tiny", action="store_true")
    a = p.parse_args(args)
    if not a.tiny and not torch.cuda.is_available(): raise NeedsHardware("a GPU (--tiny runs it on a CPU)")
    out = {}
    for kind in [a.only] if a.only else ["embedded", "vllm"]:
        with tempfile.NamedTemporaryFile(suffix=".json") as f:
            code = subprocess.run([sys.executable, __file__, kind, str(int(a.tiny)), f.name]).returncode
            if code: raise RuntimeError(f"engine_gpu: the process of {kind} ended with code {code}")
            out[kind] = json.loads(Path(f.name).read_text())
    figures = {f"{k}_{kind}": v for kind, r in out.items() for k, v in r.items()}
    if not a.only:
        e, v = out["embedded"], out["vllm"]
        figures |= dict(tokens_per_s=e["full_tokens_per_s"], ratio_vllm=e["full_tokens_per_s"]/v["full_tokens_per_s"],
            update_s=e["publish_s"]+e["load_apply_s"])
    return dict(figures=figures)


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(one(sys.argv[1], bool(int(sys.argv[2])))))
