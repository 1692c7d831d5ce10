"""What `moe-rl run` gains from one GPU: a decode step that is recorded, experts that are fused, 16 and 8 bits.

The model is an AFMoE whose widths FP8 takes: width 768, 12 layers, 32 experts of width 384, 4 a token, and a shared one. Parts, each in a process of its own:

    check    the recorded decode step against the plain one on this GPU, in float32 and in bf16
    engine   256 sequences at a time: tokens a second by the recorded step and by the plain one

    moe-rl bench gpu_road [PART ...]        all parts unless said otherwise
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moe_rl.bench import NeedsHardware

PARTS = ("check", "engine")
SEATS, PROMPT, ANSWER = 256, 64, 192


def model_of(dtype, vocab=32768, layers=12, seed=0):
    from moe_rl.moe.families import new_afmoe
    from moe_rl.moe.model import Model, init_weights, lower_precision
    spec = new_afmoe(vocab_size=vocab, hidden_size=768, intermediate_size=2048, moe_intermediate_size=384,
        num_hidden_layers=layers, num_dense_layers=1, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
        num_experts=32, num_experts_per_tok=4, num_shared_experts=1, route_scale=2., sliding_window=512,
        max_position_embeddings=4096)
    model = init_weights(Model(spec), seed).requires_grad_(False)
    if dtype != torch.float32: lower_precision(model, dtype)
    return model.cuda()


def requests(n, prompt, answer, seed=0, vocab=32768):
    from moe_rl.records import Request
    rng = np.random.default_rng(seed)
    return [Request(id=f"{seed}-{i}", prompt=rng.integers(0, vocab, prompt).tolist(), max_tokens=answer, seed=1000*seed+i)
            for i in range(n)]


def engine_of(model, compute, seats=SEATS):
    from moe_rl.rollout.engine import Engine
    return Engine(model, kv_tokens=seats*(PROMPT+ANSWER+16), max_seqs=seats, compute=compute)


def serve(engine, asked):
    "Finished requests by id, seconds, and the seconds of each step."
    for r in asked: engine.add(r)
    done, steps, began = {}, [], time.perf_counter()
    while engine.has_work:
        at = time.perf_counter()
        done |= {f.id: f for f in engine.step()}
        steps.append(time.perf_counter()-at)
    return done, time.perf_counter()-began, steps


def check():
    "Both ways on the same requests: equal tokens as far as rounding lets them be, and equal log-probabilities up to the first difference."
    from moe_rl.gpu.decode import GraphStep
    from moe_rl.rollout.engine import plain_step
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, asked = model_of(dtype, layers=4), requests(12, 40, 24)
        plain, _, _ = serve(engine_of(model, plain_step, 8), asked)
        step = GraphStep()
        fast, _, _ = serve(engine_of(model, step, 8), asked)
        again, _, _ = serve(engine_of(model, GraphStep(), 8), asked)
        same, worst, routes = [], 0., []
        for r in asked:
            a, b = plain[r.id], fast[r.id]
            n = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), len(a.token_ids))
            same.append(n/len(a.token_ids))
            worst = max(worst, float(np.abs(a.logprobs[:n]-b.logprobs[:n]).max(initial=0)))
            routes.append(float((a.routes[:39+n] == b.routes[:39+n]).mean()))
        exact = all(fast[r.id].token_ids == again[r.id].token_ids and (fast[r.id].logprobs == again[r.id].logprobs).all()
            for r in asked)
        name = str(dtype).removeprefix("torch.")
        print(f"check {name}: tokens equal {np.mean(same):.3f}, worst |d logprob| before the first difference {worst:.2e}, "
              f"routes equal {np.mean(routes):.4f}, twice the same bits {exact}, steps {step.counts}", flush=True)
        out |= {f"equal_{name}": float(np.mean(same)), f"dlogprob_{name}": worst, f"repeats_{name}": exact}
        if worst > (1e-3 if dtype == torch.float32 else .2) or not exact:
            raise AssertionError("the recorded step computes something else, or not the same twice")
    return out


def engine():
    "Tokens per second of 256 sequences, all present from the beginning, then with twice as many that wait for seats."
    from moe_rl.gpu.decode import GraphStep
    from moe_rl.rollout.engine import plain_step
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        model, name = model_of(dtype), str(dtype).removeprefix("torch.")
        e = engine_of(model, GraphStep())
        _, seconds, _ = serve(e, requests(SEATS, PROMPT, 8, seed=1))
        print(f"{name}: first 8 tokens of {SEATS} sequences, all graphs made: {seconds:.1f} s", flush=True)
        for label, n in (("full", SEATS), ("waiting", 2*SEATS)):
            before = e.counters["tokens"]
            _, seconds, steps = serve(e, requests(n, PROMPT, ANSWER, seed=2+n))
            rate, step = (e.counters["tokens"]-before)/seconds, float(np.median(steps))*1e3
            print(f"{name} graphs, {label}: {rate:.0f} tokens/s, median step {step:.2f} ms, {e.compute.counts}", flush=True)
            out |= {f"{name}_{label}": rate, f"{name}_{label}_step_ms": step}
        del e
        plain = engine_of(model, plain_step)
        _, seconds, steps = serve(plain, requests(SEATS, PROMPT, 24, seed=3))
        rate, step = plain.counters["tokens"]/seconds, float(np.median(steps))*1e3
        print(f"{name} plain: {rate:.0f} tokens/s, median step {step:.2f} ms", flush=True)
        out |= {f"{name}_plain": rate, f"{name}_plain_step_ms": step}
    return out


def figures(r):
    f = {}
    if "check" in r: f |= r["check"]
    if "engine" in r:
        e = r["engine"]
        f |= dict(engine_tokens_per_s=e["bfloat16_full"], engine_waiting_tokens_per_s=e["bfloat16_waiting"],
            engine_float32_tokens_per_s=e["float32_full"], engine_plain_tokens_per_s=e["bfloat16_plain"],
            engine_step_ms=e["bfloat16_full_step_ms"])
    return f


def measure(args):
    if not torch.cuda.is_available(): raise NeedsHardware("a GPU")
    if bad := set(args) - set(PARTS):
        raise SystemExit(f"bench gpu_road: no part {', '.join(bad)}; there are {', '.join(PARTS)}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in args or PARTS:
            out, began = Path(folder)/f"{part}.json", time.time()
            code = subprocess.run([sys.executable, __file__, part, str(out)]).returncode
            if code: print(f"part {part} ended with code {code} after {time.time()-began:.0f} s", flush=True)
            else: results[part] = json.loads(out.read_text())
    return dict(figures=figures(results), parts=results)


if __name__ == "__main__": Path(sys.argv[2]).write_text(json.dumps(globals()[sys.argv[1]]()))
