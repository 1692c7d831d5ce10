"""Broken settings, models, tokenizers and run folders: one clear line and exit code 2, nothing written, no file
outside the folder read.

Mutants are drawn by a seed and go through the commands themselves, many in one process. `--seed N`, `--configs N` and
`--folders N` choose; `--only I` shows one case, `--part I/N` every N-th from the I-th on."""
import argparse, contextlib, hashlib, io, json, os, random, shutil, signal, struct, sys, tempfile, time, traceback
from pathlib import Path
from _runs import jobs_option, parts, summed

TINY = '''dir = "runs/new"
env = "calculator"
seed = 1
[model]
hidden_size = 32
intermediate_size = 32
moe_intermediate_size = 16
num_hidden_layers = 2
num_dense_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
num_experts = 4
num_experts_per_tok = 2
max_position_embeddings = 256
[tokenizer]
kind = "byte"
[warm_start]
steps = 1
tokens_per_step = 512
threads = 1
[rl]
steps = 1
groups_per_step = 2
group_size = 2
tokens_per_batch = 512
loss = "dppo"
loss_params = {}
advantage = "grpo"
[eval]
prompts = 4
[engine]
kv_tokens = 2048
max_seqs = 8
max_tokens = 4
[checkpoint]
every = 1
'''
ODD = ["-1", "0", "1", "2", "-0.0", "1e400", "nan", "-inf", '""', '"x"', '"a:b"', '"../../x"', '"/"', '"~"', "[]", "{}",
       "[1, [2]]", "{a = 1}", "true", "2026-01-01", "10:30:00", "9" * 40, "1_0",
       "1e-300", "0x10", '"\\u0000"', '"\\ud800"', '"' + "a" * 5000 + '"', "[" * 500 + "]" * 500, "'''", "null", "None",
       "2147483647", '"auto"', "{none = true}", '["gcd", 3]', '[{name = "calculator", params = {terms = 0}}]',
       '[{name = "calculator", params = {terms = "x"}}]', '[{name = "calculator", weight = 1e9}, {name = "gcd"}]',
       '"gcd:0.5,calculator"', '"calculator:1,calculator:2"', '"nowhere:Env"', '"math:floor"', '"os:nothing"']

def mutate_text(rng:random.Random, data:bytes) -> bytes:
    "Bytes with something wrong in them."
    at, n = rng.randrange(len(data)), rng.randint(1, 8)
    return rng.choice([
        lambda: data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1:],
        lambda: data[:at] + data[at + n:],
        lambda: data[:at],
        lambda: data[:at] + rng.randbytes(n) + data[at:],
        lambda: data[:at] + data[at // 2:at // 2 + 40] + data[at:],
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.replace(b"\n", b"\r\n"),
        lambda: b"",
    ])()

def mutate_config(rng:random.Random) -> tuple[list[str], bytes]: # extra words of the command line, settings file
    "A settings file, or a command line, with something wrong."
    from moe_rl.config import all_keys
    data, keys = TINY.encode(), list(all_keys())
    kind = rng.randrange(4)
    if kind == 0: return [], mutate_text(rng, data)
    if kind == 1:   # another value
        lines = TINY.splitlines()
        for i in rng.sample([i for i, l in enumerate(lines) if "=" in l], rng.choice([1, 1, 2])):
            lines[i] = lines[i].split("=")[0] + "= " + rng.choice(ODD)
        return [], "\n".join(lines).encode(errors="surrogatepass")
    if kind == 2:   # another key, a table for a value, a key that is there twice
        lines = TINY.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = rng.choice([lambda: lines[i] + "\n" + lines[i], lambda: rng.choice(keys) + " = " + rng.choice(ODD),
                               lambda: "[" + rng.choice(keys) + "]", lambda: "[[rl]]", lambda: "x" + lines[i],
                               lambda: f"[env.params]\n{lines[i]}", lambda: lines[i].replace("=", ""),
                               lambda: '[env]\nname = "calculator"\n[env.params]\nx = ' + rng.choice(ODD)])()
        return [], "\n".join(lines).encode(errors="surrogatepass")
    words = []
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([rng.choice(keys), rng.choice(keys) + rng.choice(["x", ".x", "."]), "env.params.x",
            "env.0.weight", "env.7.weight", "rl.loss_params.eps", "lr", rng.choice("ab.-=")])
        value = rng.choice(ODD).strip('"') if rng.random() < .7 else mutate_text(rng,
            b"some text").decode("latin-1").replace("\0", "")
        words += rng.choice([[f"--{key}", value], [f"--{key}={value}"], [f"--{key}"], [value]])
    return words, data

# ---- folders

def odd_value(rng:random.Random):
    return rng.choice([None, True, -1, 0, 1, 3, 2**31, 2**70, 1.5, float("nan"), "", "x", "../../outside.safetensors",
        "/etc/hostname", [], {}, [[1]], {"a": {}}, "AfmoeForCausalLM", "float64", "a" * 3000])

def mutate_json(rng:random.Random, data:bytes) -> bytes:
    "JSON with another value, a key less, or a key more somewhere."
    tree = json.loads(data)
    node, places = tree, []
    def walk(n):
        for k in (list(n) if isinstance(n, dict) else range(len(n))) if isinstance(n, (dict, list)) else ():
            places.append((n, k))
            if len(places) < 400: walk(n[k])
    walk(tree)
    if not places: return json.dumps(odd_value(rng)).encode()
    node, k = rng.choice(places)
    what = rng.randrange(4)
    if what == 0 and isinstance(node, dict): del node[k]
    elif what == 1 and isinstance(node, dict): node["odd"] = odd_value(rng)
    else: node[k] = odd_value(rng)
    return json.dumps(tree).encode()

def mutate_tensors(rng:random.Random, data:bytes) -> bytes:
    "A safetensors file whose header lies."
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    name = rng.choice([n for n in header if n != "__metadata__"])
    t, what = header[name], rng.randrange(8)
    if what == 0: t["data_offsets"] = [t["data_offsets"][0], t["data_offsets"][1] + rng.choice([-4, 4, 2**40])]
    elif what == 1: t["shape"] = rng.choice([[], [1], [2**40], t["shape"][::-1], [*t["shape"], 1], [-1], [2**62, 4]])
    elif what == 2: t["dtype"] = rng.choice(["BF16", "F64", "I8", "F8_E4M3", "NOPE", 3])
    elif what == 3: header[name + "x"] = header.pop(name)
    elif what == 4: del header[name]
    elif what == 5: return struct.pack("<Q", rng.choice([0, 1, size + 1, 2**40, 2**63])) + data[8:]
    elif what == 6: body = body[:-rng.randint(1, len(body))]
    else:
        at = rng.randrange(len(body) // 4) * 4
        body = body[:at] + struct.pack("<f", rng.choice([float("nan"), float("inf"), -1e38, 1e-45])) + body[at + 4:]
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body

# the folder that must not be read; empty: there was no list of files to lead astray
def escape(rng:random.Random, folder:Path, outside:Path) -> str:
    "Paths that leave the folder, to a file that is a perfect copy of the right one."
    for index in sorted(folder.rglob("*.index.json")):
        tree = json.loads(index.read_bytes())
        victim = rng.choice(sorted(set(tree["weight_map"].values())))
        shutil.copy(index.parent/victim, outside/"outside.safetensors")
        way = rng.choice([os.path.relpath(outside/"outside.safetensors", index.parent),
            str(outside/"outside.safetensors"), f'x/../{os.path.relpath(outside/"outside.safetensors", index.parent)}'])
        tree["weight_map"] = {k: way if v == victim else v for k, v in tree["weight_map"].items()}
        index.write_text(json.dumps(tree))
        return index.parent.name
    for marker in sorted(folder.rglob("COMMITTED")):
        tree = json.loads(marker.read_bytes())
        if not tree["files"]: continue
        victim = rng.choice(sorted(tree["files"]))
        shutil.copy(marker.parent/victim, outside/"outside.safetensors")
        (marker.parent/victim).unlink()
        tree["files"][os.path.relpath(outside/"outside.safetensors", marker.parent)] = tree["files"].pop(victim)
        marker.write_text(json.dumps(tree))
        return marker.parent.name
    return ""

def mutate_folder(rng:random.Random, folder:Path, outside:Path) -> str:
    "Do something to one file of a folder; says what."
    if rng.random() < .15 and (led := escape(rng, folder, outside)): return f"a path that leaves the folder {led}"
    file = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith((".log", "lock"))
        and "tensorboard" not in p.parts and "report" not in p.parts))
    data, name = file.read_bytes(), file.relative_to(folder).as_posix()
    what = rng.randrange(8)
    if what == 0:
        file.unlink()
        return f"{name} is gone"
    if what == 1:
        file.unlink()
        file.mkdir()
        return f"{name} is a folder"
    if what == 2:
        file.write_bytes(rng.randbytes(len(data)))
        return f"{name} is noise"
    if what < 6 and (file.suffix == ".json" or file.name == "COMMITTED") and data:
        file.write_bytes(mutate_json(rng, data))
        return f"{name} has another value"
    if what < 7 and file.suffix == ".safetensors":
        file.write_bytes(mutate_tensors(rng, data))
        return f"{name} has a header that lies"
    if data: file.write_bytes(mutate_text(rng, data))
    return f"{name} has other bytes"

def tree_of(folder:Path) -> str:
    "One word for the names and contents of everything in a folder."
    digest = hashlib.blake2b(digest_size=8)
    for p in sorted(folder.rglob("*")):
        digest.update(f"{p.relative_to(folder)} {p.is_dir()}\n".encode(errors="surrogateescape"))
        if p.is_file(): digest.update(p.read_bytes())
    return digest.hexdigest()

FIGURES = ("cases", "refused", "accepted", "tracebacks", "unclear", "overwritten", "outside", "hangs")

class Tally:
    "What became of the cases."
    def __init__(self):
        for key in FIGURES: setattr(self, key, 0)
        self.shown = []

    def bad(self, kind:str, what:str, more:str):
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.shown) < 40:
            self.shown.append(f"{kind}: {what}: {more}")
            print(self.shown[-1][:1500], flush=True)

    def command(self, what:str, words:list[str], limit:int=60) -> int | None:
        "One command in this process; its exit code, None if it raised."
        from moe_rl import cli
        out, err = io.StringIO(), io.StringIO()
        def late(*_): raise TimeoutError("no end")
        signal.signal(signal.SIGALRM, late)
        signal.alarm(limit)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = cli.main(words)
        except TimeoutError:
            self.bad("hangs", what, " ".join(words)[:300])
            return None
        except BaseException:
            self.bad("tracebacks", what, traceback.format_exc()[-900:])
            return None
        finally: signal.alarm(0)
        said, self.out = err.getvalue().strip().splitlines(), out.getvalue()
        if code == 2 and (not said or any(not l.startswith("moe-rl: ") or len(l) > 2000 for l in said)):
            self.bad("unclear", what, f"{said[:3]}")
        elif code not in (0, 2): self.bad("unclear", what, f"exit code {code}, {said[:2]}")
        if code == 2 and os.environ.get("MUTANTS_SHOW"): print(f"  {what}: {said[0][:300]}")
        return code

def configs(tally:Tally, here:Path, rng:random.Random, n:int, mine):
    "Settings and command lines that are wrong."
    for i in range(n):
        one = random.Random(rng.randrange(2**62))
        words, data = mutate_config(one)
        if not mine(i): continue
        file = here/"settings.toml"
        file.write_bytes(data)
        before = tree_of(here)
        code = tally.command(f"config {i}", ["run", "--config", str(file), "--dry-run", *words])
        tally.cases += 1
        tally.refused += code == 2
        tally.accepted += code == 0
        if tree_of(here) != before: tally.bad("overwritten", f"config {i}", str(words))

def folders(tally:Tally, here:Path, models:list[Path], run:Path, rng:random.Random, n:int, mine):
    "Checkpoints, tokenizers and folders of runs that are damaged."
    outside = here/"elsewhere"
    outside.mkdir(exist_ok=True)
    settings = here/"fine.toml"
    settings.write_text(TINY)
    for i in range(n):
        one = random.Random(rng.randrange(2**62))
        source = one.choice([*models, run])
        if not mine(i): continue
        folder = here/"deep"/"er"/"mutant"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        what = f"folder {i} ({source.name}): {mutate_folder(one, folder, outside)}"
        before = tree_of(here)
        led = what.partition("leaves the folder ")[2]
        if source == run:
            codes = [tally.command(what, ["run", "--resume", str(folder), "--dry-run"])]
            if led and codes[0] == 0 and f"go on from {led}:" in tally.out: tally.bad("outside", what, "was read")
            codes.append(tally.command(what, ["report", str(folder)]))
        else:
            codes = [tally.command(what, ["eval", str(folder), "--config", str(settings)]),
                tally.command(what, ["run", "--dry-run", "--config", str(settings), "--model.checkpoint", str(folder)])]
        if source == run: shutil.rmtree(folder/"report", ignore_errors=True)
        shutil.rmtree(folder/"__pycache__", ignore_errors=True)
        tally.cases += 1
        tally.refused += 2 in codes
        tally.accepted += codes == [0, 0]
        if led and source != run and codes[0] == 0: tally.bad("outside", what, "was read")
        if source != run and tree_of(here) != before: tally.bad("overwritten", what, "something changed")

def sources(here:Path) -> tuple[list[Path], Path]: # model folders, a run that can be resumed
    "What is to be damaged: a model in one file, one in several, and the folder of a run that was killed."
    import subprocess
    import torch
    from moe_rl.data.tokens import byte_tokenizer, wording_tokenizer
    from moe_rl.config import load_settings
    from moe_rl.moe.checkpoint import save_pretrained
    from moe_rl.rl.trainer import build_model
    settings = here/"start.toml"
    settings.write_text(TINY)
    run = here/"run"
    done = subprocess.run([sys.executable, "-m", "moe_rl.cli", "run", "--config", str(settings), "--dir", str(run),
        "--schedule.silence_seconds", "600"], capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"bench mutants: the run to be damaged failed: {done.stderr[-2000:]}")
    (run/"finished.json").unlink()
    torch.manual_seed(0)
    s, whole, parts = load_settings(settings), here/"whole", here/"parts"
    tokenizer = byte_tokenizer()
    save_pretrained(build_model(s, tokenizer.vocab_size), whole, extra_files=tokenizer.save)
    tokenizer = wording_tokenizer([f"Compute {i}*{i}: " for i in range(20)])
    save_pretrained(build_model(s, tokenizer.vocab_size), parts, extra_files=tokenizer.save, shard_bytes=40_000)
    return [whole, parts], run

def part(seed:int, n:int, m:int, mine) -> dict: # mine(i): whether a case is ours
    "The cases of one process."
    began, old, tally = time.monotonic(), os.getcwd(), Tally()
    with tempfile.TemporaryDirectory() as d:
        os.chdir(d)
        try:
            here = Path(d)/"configs"
            (here/"runs").mkdir(parents=True)
            configs(tally, here, random.Random(seed), n, mine)
            print(f"{tally.cases} settings: {tally.refused} refused, {tally.accepted} accepted, "
                  f"{time.monotonic() - began:.0f} s", flush=True)
            if m:
                there = Path(d)/"folders"
                there.mkdir()
                models, run = sources(there)
                work = Path(d)/"work"
                work.mkdir()
                folders(tally, work, models, run, random.Random(seed + 1), m, mine)
        finally: os.chdir(old)
    print(f"{tally.cases} cases in {time.monotonic() - began:.0f} s", flush=True)
    return dict(figures={k: getattr(tally, k) for k in FIGURES})

def measure(args:list[str]) -> dict:
    p = argparse.ArgumentParser(prog="moe-rl bench mutants")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--configs", type=int, default=1000)
    p.add_argument("--folders", type=int, default=200)
    p.add_argument("--only", type=int, help="one case")
    p.add_argument("--part", default="", help="I/N: every N-th case from the I-th on")
    jobs_option(p, "parts")
    a = p.parse_args(args)
    if a.only is not None: return part(a.seed, a.configs, a.folders, lambda i: i == a.only)
    if a.part:
        first, every = map(int, a.part.split("/"))
        return part(a.seed, a.configs, a.folders, lambda i: i % every == first)
    began, words = time.monotonic(), [f"--{k}={getattr(a, k)}" for k in ("seed", "configs", "folders")]
    done = parts("mutants", [[*words, f"--part={i}/{a.jobs}"] for i in range(a.jobs)], a.jobs, 1)
    figures = summed(done, FIGURES) | dict(seconds=round(time.monotonic() - began))
    print(figures)
    return dict(figures=figures)
