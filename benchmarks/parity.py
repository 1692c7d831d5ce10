"""Two parities. Our checkpoints in transformers and theirs in our model: same logits. Decoding in the engine and one forward pass: same numbers."""
import argparse, random, shutil, tempfile
from pathlib import Path

import torch
from torch import Tensor

from moe_rl.moe.attention import packed_attend, packed_positions
from moe_rl.moe.checkpoint import load_pretrained, save_pretrained, to_hf_config
from moe_rl.moe.model import Afmoe, ModelConfig, init_weights


def draw_config(rng:random.Random) -> ModelConfig:
    "A small model with everything that can differ drawn at random; windows are shorter than the documents."
    kv, dense = rng.choice([1, 2, 3]), rng.randint(1, 3)
    experts = rng.randint(4, 16)
    return ModelConfig(vocab_size=rng.randint(60, 200), hidden_size=rng.choice([24, 32, 48, 64]), intermediate_size=rng.choice([40, 64, 96]),
        moe_intermediate_size=rng.choice([8, 16, 24]), num_hidden_layers=dense+rng.randint(1, 4), num_dense_layers=dense,
        num_attention_heads=kv*rng.choice([1, 2, 3, 4]), num_key_value_heads=kv, head_dim=rng.choice([8, 16, 24]),
        num_experts=experts, num_experts_per_tok=rng.randint(1, min(8, experts)), num_shared_experts=rng.randint(1, 2), route_scale=rng.choice([1., 2.448, 2.826]),
        global_attn_every_n_layers=rng.choice([2, 3, 4]), sliding_window=rng.randint(2, 12), rope_theta=rng.choice([1e4, 5e5]),
        rms_norm_eps=rng.choice([1e-5, 1e-6]), max_position_embeddings=256, mup_enabled=rng.random() < 0.75)


@torch.no_grad()
def stir(tensors:dict[str, Tensor], gen:torch.Generator) -> None:
    "Move every gain and every expert bias away from where it starts, so that a swapped or forgotten one shows."
    for name, t in sorted(tensors.items()):
        if "norm" in name: t.mul_(1+0.2*torch.randn(t.shape, generator=gen))
        elif "expert_bias" in name: t.copy_(0.2*torch.randn(t.shape, generator=gen))


def draw_documents(rng:random.Random, gen:torch.Generator, cfg:ModelConfig) -> tuple[list[Tensor], Tensor]:
    "Documents longer than the window, and their cumulative lengths."
    docs = [torch.randint(0, cfg.vocab_size, (rng.randint(cfg.sliding_window+3, 48),), generator=gen) for _ in range(3)]
    return docs, torch.tensor([0]+[len(d) for d in docs]).cumsum(0)


@torch.no_grad()
def our_logits(model:Afmoe, docs:list[Tensor], cu:Tensor) -> Tensor: # [N,V], documents packed in one row
    return model.logits(model(torch.cat(docs), packed_positions(cu), packed_attend(cu)).hidden)


@torch.no_grad()
def their_logits(model, docs:list[Tensor]) -> Tensor: # [N,V], documents one by one
    return torch.cat([model(d[None]).logits[0] for d in docs])


def hf_parity(seed:int, home:Path) -> tuple[ModelConfig, float, float]:
    "One drawn configuration both ways: largest difference of logits when transformers reads our files, and when we read theirs."
    from transformers import AfmoeConfig, AfmoeForCausalLM
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    cfg = draw_config(rng)
    docs, cu = draw_documents(rng, gen, cfg)

    ours = init_weights(Afmoe(cfg), seed)
    stir(ours.state_dict(), gen)
    save_pretrained(ours, home/f"ours-{seed}", shard_bytes=rng.choice([1 << 14, 1 << 30]))
    there = (their_logits(AfmoeForCausalLM.from_pretrained(home/f"ours-{seed}"), docs) - our_logits(ours, docs, cu)).abs().max().item()

    torch.manual_seed(seed)
    theirs = AfmoeForCausalLM(AfmoeConfig(**to_hf_config(cfg), pad_token_id=None)).eval()
    for p in theirs.parameters():
        if p.ndim > 1: p.data = torch.randn(p.shape, generator=gen)*0.5/cfg.hidden_size**0.5 # the router too, which starts as zeros
    stir({n: p.data for n, p in theirs.named_parameters()}, gen)
    theirs.save_pretrained(home/f"theirs-{seed}", max_shard_size=rng.choice(["20KB", "1GB"]))
    loaded = load_pretrained(home/f"theirs-{seed}")
    if loaded.cfg != cfg: raise AssertionError(f"configuration changed on the way: {cfg} became {loaded.cfg}")
    back = (their_logits(theirs, docs) - our_logits(loaded, docs, cu)).abs().max().item()
    return cfg, there, back


def hf_parities(count:int, first_seed:int) -> list[tuple[ModelConfig, float, float]]:
    import transformers
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    home, rows = Path(tempfile.mkdtemp(prefix="parity-")), []
    print(f"{'L':>3}{'dense':>6}{'H/KV':>6}{'W':>4}{'E':>4}{'k':>3}  theirs reads ours  ours reads theirs")
    try:
        for seed in range(first_seed, first_seed+count):
            cfg, there, back = hf_parity(seed, home)
            rows.append((cfg, there, back))
            print(f"{cfg.num_hidden_layers:>3}{cfg.num_dense_layers:>6}{cfg.num_attention_heads:>4}/{cfg.num_key_value_heads}{cfg.sliding_window:>4}{cfg.num_experts:>4}"
                  f"{cfg.num_experts_per_tok:>3}  {there:>17.1e}  {back:>17.1e}", flush=True)
    finally: shutil.rmtree(home)
    return rows


def measure(args:list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="moe-rl bench parity")
    parser.add_argument("--configs", type=int, default=24, help="drawn configurations for the comparison with transformers")
    parser.add_argument("--seed", type=int, default=0, help="of the first configuration")
    a = parser.parse_args(args)
    rows = hf_parities(a.configs, a.seed)
    return {"figures": {"hf_max_diff": max(max(there, back) for _, there, back in rows), "configs": len(rows)}}
