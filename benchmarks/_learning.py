"""A small model, rollouts that an engine really sampled from it, and the trainer that learns from them."""
import copy
from moe_rl.config import load_settings
from moe_rl.data.batch import micro_batches
from moe_rl.records import Request, Rollout, sampling_of
from moe_rl.rl.trainer import Trainer
from moe_rl.rollout.engine import Engine

SIZES = dict(hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=4, num_dense_layers=1,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
             sliding_window=32)
VOCABULARY = 64


def trainer(model, s) -> Trainer:
    "A trainer as the program makes it."
    return Trainer(model, s.rl, s.optim, s.balance, sampling_of(s.engine))


def settings(**more):
    "Settings of a run with a model of a few thousand weights."
    return load_settings(overrides={f"model.{k}": v for k, v in SIZES.items()}
        | {"optim.warmup_steps": 0, "rl.tokens_per_batch": 512} | more)


def rollouts(model, n: int, seed: int, max_tokens: int = 16) -> list[Rollout]:
    "Finished answers of an engine that computes with `model`, routes and log-probabilities included."
    engine = Engine(copy.deepcopy(model), kv_tokens=n*64, max_seqs=n)
    prompts = [[1 + i % 7, 5, 9 + i % 11, 3] for i in range(n)]
    for i, p in enumerate(prompts): engine.add(Request(id=str(i), prompt=p, max_tokens=max_tokens, seed=seed + i))
    done = []
    while engine.has_work: done += engine.step()
    out = []
    for f in sorted(done, key=lambda f: int(f.id)):
        i, m = int(f.id), len(f.token_ids)
        out.append(Rollout(token_ids=prompts[i] + f.token_ids, loss_mask=[0]*4 + [1]*m,
                           logprobs=[0.]*4 + f.logprobs.tolist(), versions=[-1]*4 + [0]*m,
                           routes=f.routes, reward=float(i % 2), group=i // 2, index=i % 2, env="bench",
                           stop_reason=f.stop_reason))
    return out


def batches(model, steps: int, advantages, n: int = 16, seed: int = 0) -> list:
    "One batch per step, all sampled from `model` before it moves; `advantages(n)` are those of each step."
    return [micro_batches(rollouts(model, n, seed + 1000*s), advantages(n), 512) for s in range(steps)]
