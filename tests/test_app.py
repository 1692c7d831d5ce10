"""The program as its user meets it: commands, exit codes, one line for every mistake, own code by import path,
report and doctor."""
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moe_rl import cli, doctor
from moe_rl.config import Settings, load_settings
from moe_rl.display import Display, Ticker
from moe_rl.errors import UserError
from moe_rl.report import PICTURES, read_run, write_report
from moe_rl.rl.log import RunLog, claim, read_lines
from moe_rl.rl.rows import EvalRow, Phase, StepRow
from moe_rl.rl.run import DONE, run
from rich.console import Console

TINY = {"model.hidden_size": 32, "model.intermediate_size": 32, "model.moe_intermediate_size": 16,
        "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.num_key_value_heads": 1,
        "model.head_dim": 8, "model.num_experts": 4, "model.max_position_embeddings": 256, "tokenizer.kind": "byte",
        "warm_start.steps": 2, "warm_start.tokens_per_step": 256, "warm_start.threads": 1,
        "rl.steps": 2, "rl.groups_per_step": 2, "rl.group_size": 2, "rl.tokens_per_batch": 512, "eval.prompts": 8,
        "engine.kv_tokens": 2048, "engine.max_seqs": 16, "engine.max_tokens": 4}

MODULE = '''
import numpy as np, torch
from moe_rl.rl.loss import LossOut
from moe_rl.rollout.environments import Environment, Task

class Letters(Environment):
    "Say the first of three letters."
    name = 'letters'
    def __init__(self, wording='Say the first letter of ', bad='', length=3): self.wording, self.bad, self.length = wording, bad, length
    def problem(self, key):
        word = ''.join(chr(97 + (key >> 5*i) % 26) for i in range(self.length))
        if self.bad == 'one text': word = 'abc'
        return Task(env=self.name, prompt=self.wording + word + ': ', answer=None if self.bad == 'no answer' else word[0])
    async def score(self, task, turns):
        if self.bad == 'nan': return float('nan')
        if self.bad == 'raises': raise OSError('judge is away')
        return float(turns[-1][:1] == task.answer)

def half_length(task, turns): return len(turns[-1]) / 2
def spread(rewards): return np.asarray(rewards) - np.min(rewards)
def plain(logp, logp_old, adv, mask, cu_seqlens, scale=1.0):
    return LossOut(-scale * torch.where(mask, logp * adv, 0.0), torch.zeros_like(mask), torch.zeros_like(mask))
not_a_function = 3
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a user's own module, which is also the working directory."
    folder = tmp_path_factory.mktemp("home")
    (folder / "my_task.py").write_text(MODULE)
    (folder / "broken.py").write_text("class Env(:\n")
    (folder / "fails.py").write_text("import math\nlimit = 1 / 0\n")
    old, path = os.getcwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    os.chdir(old)
    sys.path[:] = path


def flags(**more):
    return [part for k, v in (TINY | {k.replace("__", "."): v for k, v in more.items()}).items()
        for part in (f"--{k}", str(v))]


def process(home, *args, **kw):
    "The command in a process of its own."
    return subprocess.run([sys.executable, "-m", "moe_rl.cli", *map(str, args)], cwd=home, capture_output=True,
                          text=True, timeout=120,
                          env=os.environ | dict(OMP_NUM_THREADS="1"), **kw)


def said(capsys, *args):
    "Exit code and the lines on standard error of a command in this process."
    capsys.readouterr()
    code = cli.main(list(map(str, args)))
    return code, capsys.readouterr().err.strip().splitlines()


def refused(capsys, *args):
    "The one line with which a command is refused."
    code, lines = said(capsys, *args)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("moe-rl: "), (code, lines)
    return lines[0]


@pytest.fixture(scope="module")
def finished(home):
    "A real run from the command line: own environment, reward, loss and advantage; everything else tiny."
    done = process(home, "run", *flags(dir="runs/own", env="my_task:Letters", rl__reward="my_task:half_length",
                                       rl__loss="my_task:plain", rl__loss_params="{'scale': 2.0}",
                                       rl__advantage="my_task:spread", checkpoint__every=1, eval__every=1))
    assert done.returncode == 0, done.stderr
    return home / "runs" / "own", done


# ---- a run of one's own

def test_own_code_by_import_path(finished):
    folder, done = finished
    assert "report in runs/own/report/report.md" in done.stdout
    assert not done.stderr
    rows, samples = read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl")
    assert [r["step"] for r in rows] == [1, 2]
    # half_length, not Letters.score
    for s in samples: assert s["reward"] == len(s["text"].split(": ", 1)[1].replace("�", "?")) / 2 or "�" in s["text"]
    # spread makes no advantage negative
    assert all(r["rollouts"] == 4 for r in rows) and rows[0]["loss"] <= 0
    settings = load_settings(folder / "config.toml")
    assert settings.rl.loss_params == {"scale": 2.0} and settings.rl.reward == "my_task:half_length"
    assert {p.name for p in (folder / "model").iterdir()} == {"README.md", "chat_template.jinja", "config.json",
        "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_python_api(home):
    "The same from Python, with `run`."
    rows = []
    settings = load_settings(overrides=TINY | {"dir": str(home / "runs" / "api"), "env": "my_task:Letters",
        "rl.steps": 1, "rl.reward": "my_task:half_length", "rl.advantage": "my_task:spread", "warm_start.steps": 1})
    last = run(settings, show=rows.append)
    assert last["step"] == 1 and last["prompts"] == 8
    [row] = [r for r in rows if isinstance(r, StepRow)]
    assert row.step == 1 and row.grad_norm is not None
    unnamed = [k for k in row.more if not k.startswith(("loss_", "stale_", "dropped_"))]
    assert unnamed == [], "a number of every step is a field of StepRow"
    assert (home / "runs" / "api" / "model" / "config.json").exists()


def test_report_of_a_real_run(finished):
    folder, _ = finished
    text = (folder / "report" / "report.md").read_text()
    assert "finished after 2 of 2 steps" in text and "`rl.loss`" in text and "my&#95;task:plain" in text
    for name in PICTURES:
        assert (folder / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"]({name}.png)" in text
    data = read_run(folder)
    assert data.trained == 8 and data.has("reward", "entropy", "grad_norm", "max_vio", "stale_0", "tokens_per_s",
        "engine_tokens_per_s", "trainer_waits", "engine_waits", "utilisation")
    assert (data["stale_0"] + data["stale_1"] + data["stale_2"] == data["loss_tokens"]).all()


def test_report_of_a_killed_or_unfinished_run(tmp_path):
    "Cut-off lines, missing files and a single step are no reason to fail."
    claim(tmp_path / "run", Settings(), resume=False).close()
    assert "stopped before its end after 0 of 200 steps" in write_report(tmp_path / "run").read_text()
    log = RunLog(tmp_path / "run", tensorboard=False)
    log.metrics(StepRow(step=1, reward=float("nan"), exact=None, seconds=3.0))
    log.ledger(1, ["0-0"], dict(stale=["0-1", "0-2"]))
    log.eval(EvalRow(step=0, exact=.5, interval=[.4, .6], pass_at_k={"1": .5}, score=.5, prompts=8, samples=1,
        seconds=1.0, eval_seconds=.5))
    log.sample(dict(step=1, id="0-0", reward=1.0, text="a | b\n```\n<script>"))
    log.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as f: f.write('{"step": 2, "rew')
    text = write_report(tmp_path / "run").read_text()
    assert "after 1 of 200 steps" in text and "<script>" not in text and read_run(tmp_path
        / "run").dropped == {"stale": 2}
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert cli.main(["report", str(tmp_path)]) == 2 == cli.main(["report"])


def test_report_leaves_the_backend_alone(finished):
    code = ('import matplotlib; matplotlib.use("svg"); from moe_rl.report import write_report; '
            f'write_report({str(finished[0])!r}); print(matplotlib.get_backend().lower(), '
            'matplotlib.rcParams["font.size"])')
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | dict(PYTHONPATH=str(Path(cli.__file__).parents[1])))
    assert out.stdout.split() == ["svg", "10.0"], out.stderr


def test_eval(finished, capsys):
    folder, _ = finished
    assert cli.main(["eval", str(folder / "model"), *flags(env="my_task:Letters", eval__samples=4,
        eval__temperature=1.0)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["pass_at_k"]) == ["1", "2",
        "4"] and result["prompts"] == 8 and result["interval"][0] <= result["exact"] <= result["interval"][1]
    assert result["pass_at_k"]["1"] == pytest.approx(result["exact"]) and result["pass_at_k"]["1"] <= result[
        "pass_at_k"]["4"]


def test_sft(home, capsys):
    assert cli.main(["sft", *flags(dir="runs/sft", env="my_task:Letters", warm_start__steps=3)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sft_steps"] == 3
    assert cli.main(["eval", "runs/sft/model", *flags(env="my_task:Letters")]) == 0
    assert "both 0" in refused(capsys, "sft", *flags(dir="runs/sft2", env="my_task:Letters", warm_start__steps=0,
        warm_start__seconds=0))
    assert "not empty" in refused(capsys, "sft", *flags(dir="runs/sft", env="my_task:Letters"))
    assert not (home / "runs" / "sft2").exists()


# ---- mistakes: one line, code 2, nothing overwritten, nothing begun

@pytest.mark.parametrize("args, words", [
    (["--rl.stepz", "3"], "unknown key 'rl.stepz'; did you mean 'rl.steps'"),
    (["--rl.steps", "many"], "rl.steps"),
    (["--rl.steps"], "needs a value"),
    (["--config", "nowhere.toml"], "nowhere.toml: no such settings file"),
    (["--env", "spell_backwards"], "no reasoning-gym task 'spell_backwards'; did you mean 'spell_backward'"),
    (["--env", "no_such_module:Env"], "no_such_module:Env: cannot be imported"),
    (["--env", "my_task:Nothing"], "my_task:Nothing: cannot be imported"),
    (["--rl.loss", "dpo"], "rl.loss: 'dpo', expected one of"),
    (["--rl.loss", "my_task:nothing"], "my_task:nothing: cannot be imported"),
    (["--rl.loss_params", "{'eps': 1.0}"], "has no setting 'eps'"),
    (["--rl.advantage", "gae"], "rl.advantage: 'gae'"),
    (["--rl.reward", "f1"], "rl.reward: 'f1'"),
    (["--rl.reward", "exakt"], "did you mean 'exact'"),
    (["--lr", "1e-3"], "did you mean 'warm_start.muon_lr' or"),
    (["@", "job.toml"], "a settings file is given as --config FILE.toml"),
    (["--seed", "20000000000000000000000"], "less than 4294967296"),
    (["--tokenizer.kind", "bpe", "--tokenizer.vocab_size", "100"], "vocab_size 100 does not hold all bytes"),
    (["--env", "spell_backward:inf,string_insertion:1"], "env.0.weight: Input should be a finite number"),
    (["--env", "broken:Env"], "broken.py, line 1: SyntaxError"),
    (["--env", "fails:Env"], "fails.py, line 2: ZeroDivisionError"),
    (["--env", '[{"name": "my_task:Letters", "params": {"x": NaN}}]'], "env"),
    (["--env", "gcd,lcm", "--env.params.x", "3"], "'env.0.params.x' is the first"),
    (["--rl", "5"], "'rl.steps' is inside 'rl', which is a value"),
    (["--dir", "~nobody_at_all/x"], "there is no such home folder"),
    (["--dir", ""], "dir"),
    (["--rl.reward", "my_task:nothing"], "my_task:nothing: cannot be imported"),
    (["--model.head_dim", "7"], "head_dim=7 must be even"),
    (["--model.head_dim", "8", "--model.num_experts", "1" * 30],
        "model.num_experts: Input should be less than or equal to"),
    (["--model.checkpoint", "nowhere"], "nowhere"),
    (["--engine.kv_tokens", "32"], "env letters: a prompt of 31 tokens and engine.max_tokens = 4 exceed "
                                   "engine.kv_tokens (32)"),
    (["--rl.tokens_per_batch", "20"], "exceed rl.tokens_per_batch (21)"),
    (["--model.max_position_embeddings", "30"], "exceed model.max_position_embeddings (30)"),
    (["--env", '[{"name": "my_task:Letters", "params": {"bad": "one text"}}]'], "1 different prompts"),
    (["--env", '[{"name": "my_task:Letters", "params": {"size": 3}}]'], "params refused"),
    (["--schedule.device", "tpu"], "schedule.device"),
    (["--launch.port", "99999"], "launch.port"),
    (["--launch.kind", "slrum"], "launch.kind: \'slrum\', expected one of local"),
    (["stray"], "expected --key value, got 'stray'"),
])
def test_bad_settings(home, capsys, args, words):
    line = refused(capsys, "run", *flags(dir="runs/bad", env="my_task:Letters"), *args)
    assert words in line
    assert not (home / "runs" / "bad").exists()                # nothing was begun


def test_all_mistakes_at_once(capsys):
    code, lines = said(capsys, "run", "--rl.steps", "many", "--rl.loss", "dpo", "--rl.stepz", "3")
    assert code == 2 and len(lines) == 3 and all(line.startswith("moe-rl: command line: ") for line in lines)


def test_a_mistake_is_found_before_torch_is_imported(home):
    "Settings, names and files are judged first; only then come the seconds that torch needs."
    (home / "slow").mkdir(exist_ok=True)
    (home / "slow" / "torch.py").write_text('raise SystemExit("torch was imported")\n')
    env = os.environ | dict(PYTHONPATH=f"{home}/slow:{Path(cli.__file__).parents[1]}")
    (home / "late.toml").write_text("rl.step = 3\n")
    for args in (["--rl.stepz", "3"], ["--rl.loss", "dpo"], ["--rl.loss", "broken:loss"],
            ["--model.checkpoint", "no/model"], ["--config", "late.toml"], ["--resume", "nowhere"]):
        for command in ("run", "sft", "eval"):
            if command != "run" and "--resume" in args: continue
            out = subprocess.run([sys.executable, "-m", "moe_rl.cli", command, *(["slow"] if command == "eval" else []),
                *args], capture_output=True, text=True, env=env, cwd=home)
            assert out.returncode == 2 and "torch" not in out.stderr and len(out.stderr.splitlines()) == 1, (args,
                out.stderr)


def test_names_of_losses_advantages_and_rewards_are_those_of_the_code():
    from moe_rl import config
    from moe_rl.rl import advantage, loss
    assert config.LOSSES == tuple(loss.LOSSES) and config.ADVANTAGES == tuple(advantage.ADVANTAGES)


def test_dry_run_and_print_config(home, capsys):
    "All checks, the settings as they would be, and nothing begun."
    assert cli.main(["run", "--dry-run", *flags(dir="runs/dry", env="my_task:Letters")]) == 0
    assert "runs/dry: ready to start: 2 layers, 4 experts" in capsys.readouterr().out and not (home / "runs"
        / "dry").exists()
    assert "params refused" in refused(capsys, "run", "--dry-run", *flags(dir="runs/dry", env="my_task:Letters"),
        "--env.params.size", "3")
    assert cli.main(["run", "--print-config", *flags(dir="runs/dry", env="my_task:Letters")]) == 0
    (home / "printed.toml").write_text(capsys.readouterr().out)
    assert load_settings(home / "printed.toml") == load_settings(overrides=TINY
        | {"dir": "runs/dry", "env": "my_task:Letters"})


def test_files_environment_and_command_line(home, capsys, monkeypatch):
    """Later layers win; a byte order mark is none of the contents; `~` is the home folder; a day is a name; `true`
    is a text where a text is wanted."""
    (home / "one.toml").write_text("\ufeffdir = 2026-01-01\n[rl]\nsteps = 3\ngroup_size = 4\n", encoding="utf-8")
    (home / "two.toml").write_text("[rl]\nsteps = 5\n")
    monkeypatch.setenv("MOE_RL_RL__GROUP_SIZE", "6")
    monkeypatch.setenv("MOE_RL_TOKEN", "a secret")
    def printed(*args):
        assert cli.main(["run", "--print-config", *args]) == 0
        (home / "printed.toml").write_text(capsys.readouterr().out)
        return load_settings(home / "printed.toml")
    s = printed("--config", "one.toml", "--config=two.toml")
    assert (s.dir, s.rl.steps, s.rl.group_size) == ("2026-01-01", 5, 6)
    assert printed("--rl.group-size=8").rl.group_size == 8
    assert printed("--dir", "~/runs/a").dir == str(Path.home() / "runs" / "a") and printed("--dir",
        "true").dir == "true"
    assert printed("--env", "gcd", "--env.params.max_num", "9").env[0].params == {"max_num": 9}
    monkeypatch.setenv("MOE_RL_RL__STEP", "6")
    assert "MOE_RL_RL__STEP: unknown key 'rl.step'; did you mean MOE_RL_RL__STEPS?" in refused(capsys, "run")


def test_settings_of_every_type_come_back(home, capsys):
    "What a task may be given, config.toml holds."
    import datetime
    params = dict(limit=None, since=datetime.date(2026, 1, 1), at=datetime.time(10, 30), sizes=(1, (2, None)),
        text='"a"\n\\\x00é', deep=[dict(of=None)], big=-1e300, none=dict(none=1))
    from moe_rl.config import to_toml
    from moe_rl.report import changed
    s = load_settings(overrides={"env": [dict(name="my_task:Letters", params=params)]})
    assert "2026-01-01" in str(changed(s.model_dump()))
    (home / "types.toml").write_text(to_toml(s), encoding="utf-8")
    back = load_settings(home / "types.toml")
    assert back == s and back.env[0].params["sizes"] == [1, [2, None]] and back.env[0].params["limit"] is None
    for bad in ({1, 2}, b"x", object(), "\ud800", datetime.time(1, tzinfo=datetime.timezone.utc)):
        with pytest.raises(UserError, match="env.0.params: .*config.toml"):
            load_settings(overrides={"env": [dict(name="a", params=dict(x=bad))]})


def test_a_reader_who_goes_away(home):
    "`moe-rl run --help | head -1` is no mistake."
    code = f"{sys.executable} -m moe_rl.cli run --help | head -1; echo ${{PIPESTATUS[0]}}"
    out = subprocess.run(["bash", "-c", code], cwd=home, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "0" and not out.stderr, (out.stdout, out.stderr)


def test_a_loop_is_running(finished, home):
    "In a notebook's cell `run`, `evaluate` and `main` work as anywhere."
    import asyncio
    from moe_rl.rl.run import evaluate
    async def cell():
        one = evaluate(load_settings(overrides=TINY | {"env": "my_task:Letters"}), finished[0] / "model")
        two = cli.main(["eval", str(finished[0] / "model"), *flags(env="my_task:Letters")])
        last = run(load_settings(overrides=TINY | {"dir": str(home / "runs" / "cell"), "env": "my_task:Letters",
            "rl.steps": 1, "warm_start.steps": 1}))
        return one["prompts"], two, last["step"]
    assert asyncio.run(cell()) == (8, 0, 1)


def test_an_evaluation_asks_what_the_run_asked(finished, home, monkeypatch):
    "The held-out problems that the run kept, and so its own figures; of another task, others that are drawn."
    from moe_rl.rl import run as module
    from moe_rl.rl.log import read_lines
    def drawn(*_, **__): raise AssertionError("drawn anew")
    monkeypatch.setattr(module, "make_ready", drawn)
    s, (folder, *_) = load_settings(overrides={"env": "my_task:Letters"}), finished
    last, got = read_lines(folder / "evals.jsonl")[-1], module.evaluate(s, folder / "model")
    assert all(got[k] == last[k] for k in ("prompts", "exact", "score"))
    s.eval.prompts = 3
    assert module.evaluate(s, folder / "model")["prompts"] == 3
    with pytest.raises(AssertionError, match="drawn anew"):
        module.evaluate(load_settings(overrides={"env": "calculator"}), folder / "model")


def test_bad_command(capsys):
    assert "doctor takes one folder" in refused(capsys, "doctor", "the", "house")
    assert "completion needs the name of a shell" in refused(capsys, "completion")
    assert "no command 'rum'" in refused(capsys, "rum")
    assert "eval needs a model folder" in refused(capsys, "eval")
    assert "no bench" in refused(capsys, "bench", "no_such_bench")
    assert "no run" in refused(capsys, "run", "--resume", "nowhere")


def damaged(folder, name, damage):
    "A copy of a model folder with something wrong in it."
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    damage(copy)
    return copy

def truncate(copy): (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-1000])
def foreign(copy):
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("AfmoeForCausalLM",
        "LlamaForCausalLM"))
def vocabulary(copy):
    (copy / "config.json").write_text(re.sub(r'"vocab_size": \d+', '"vocab_size": 100',
        (copy / "config.json").read_text()))
def no_tokenizer(copy): (copy / "tokenizer.json").unlink()
def lost_tensor(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors")

@pytest.mark.parametrize("damage, words", [(truncate, "model.safetensors is truncated"),
                                           (foreign, "do not belong together"), (vocabulary, "vocab_size=100"),
                                           (no_tokenizer, "tokenizer.json: no such file"),
                                           (lost_tensor, "has no tensor lm_head.weight")],
                                           ids=lambda x: getattr(x, "__name__", ""))
def test_bad_checkpoint(finished, capsys, damage, words):
    folder = damaged(finished[0] / "model", f"bad-{damage.__name__}", damage)
    for command in (["run", *flags(dir="runs/from-bad", env="my_task:Letters", model__checkpoint=folder)],
            ["eval", folder, *flags(env="my_task:Letters")]):
        line = refused(capsys, *command)
        assert words in line and str(folder) in line
    assert not (folder.parents[1] / "from-bad").exists()


def test_known_failure_nothing_is_overwritten(finished, capsys):
    "A second run in the folder of the first is refused, and so is a resume with settings or beside a live owner."
    folder = damaged(finished[0], "unfinished", lambda c: (c / DONE).unlink())
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert "exists and is not empty" in refused(capsys, "run", *flags(dir=folder, env="my_task:Letters"))
    assert "takes one run folder and no settings" in refused(capsys, "run", "--resume", folder, "--rl.steps", "9")
    lock = claim(folder, None, resume=True)
    before[folder / "lock"] = (folder / "lock").stat().st_mtime_ns
    assert "in use by another run" in refused(capsys, "run", "--resume", folder)
    lock.close()
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    before.pop(folder / "lock"), after.pop(folder / "lock")
    assert before == after


def test_damaged_run_is_not_resumed(finished, capsys):
    folder = damaged(finished[0], "damaged", lambda c: ([truncate(step) for step in (c / "checkpoints").glob("step_*")],
        (c / DONE).unlink()))
    assert "step_2/model.safetensors has" in refused(capsys, "run", "--resume", folder)
    (folder / "config.toml").write_text("rl = [")
    assert "not valid TOML" in refused(capsys, "run", "--resume", folder)


def test_port_in_use(home, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refused(capsys, "run",
            *flags(dir="runs/port", env="my_task:Letters", launch__port=port))
    assert not (home / "runs" / "port").exists()


@pytest.mark.parametrize("bad, words", [("nan", "16 rollouts in a row were lost, the last: letters: score failed: "
                                                "reward is nan"),
                                                ("raises", "16 rollouts in a row were lost, the last: letters: score "
                                                           "failed: OSError: judge is away")])
def test_bad_reward(home, capsys, bad, words):
    "An environment that never works does not go on for ever."
    line = refused(capsys, "run", *flags(dir=f"runs/{bad}", env=json.dumps([dict(name="my_task:Letters",
        params=dict(bad=bad))]), eval__prompts=16, warm_start__steps=1))
    assert words in line and "--resume" in line


def test_full_disk(home):
    "No file may grow beyond 40 KiB: the first checkpoint does not fit, and the run says so."
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 10, 40 << 10))
    done = process(home, "run", *flags(dir="runs/full", env="my_task:Letters"), preexec_fn=limit)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, (done.returncode, done.stderr)
    assert "cannot write" in lines[0] and "safetensors" in lines[0] and "File too large" in lines[
        0] and "free space" in lines[0]
    assert not list((home / "runs" / "full" / "checkpoints").glob("step_*")) and not list((home / "runs" / "full"
        / "weights").glob("v*"))


def test_full_disk_of_the_log(tmp_path):
    "A log that can't be written names its file; /dev/full is a disk without room."
    claim(tmp_path / "run", Settings(), resume=False).close()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path / "run", tensorboard=False)
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No space left on device"):
        log.metrics(StepRow(step=1, reward=1.0))
    log.close()


# ---- doctor and display

def test_doctor(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path)]) in (0, 2)
    assert "moe-rl doctor" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_doctor_finds_what_stops_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: "" if name == "torch" else "9.9")
    monkeypatch.setattr(doctor, "PROBE", 'raise OSError("libtorch_cpu.so: undefined symbol")')
    monkeypatch.setattr(doctor.socket.socket, "bind", lambda *a: (_ for _ in ()).throw(OSError("not allowed")),
        raising=False)
    def broken(): raise ZeroDivisionError("odd machine")
    monkeypatch.setattr(doctor, "compiler_check", broken)
    checks = doctor.examine(tmp_path, seconds=20)
    by = {c.what: c for c in checks if c.verdict == "stop"}
    assert "pip install" in [c for c in checks if c.what == "torch"][0].remedy and "loopback port" in by
    assert any(c.what == "torch" and "undefined symbol" in c.found for c in checks)
    assert [c.verdict for c in checks if c.what == "C compiler"] == ["warn"]
    assert doctor.show(checks, Console(file=open(os.devnull, "w"))) == 2


def test_commands_without_torch(tmp_path):
    "help, doctor and a misspelled key must work where torch is broken."
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('raise ImportError("broken torch")')
    env = os.environ | dict(PYTHONPATH=f"{tmp_path}:{Path(cli.__file__).parents[1]}", COLUMNS="200")
    for args, words in ((["--help"], "usage: moe-rl"), (["run", "--help"], "rl.max_staleness"),
            (["doctor"], "broken torch")):
        out = subprocess.run([sys.executable, "-m", "moe_rl.cli", *args], capture_output=True, text=True, env=env,
            cwd=tmp_path)
        assert words in out.stdout and not out.stderr, (args, out.stdout, out.stderr)
        assert out.returncode == (2 if args == ["doctor"] else 0)


def screen(home, args, seconds, until):
    "What a terminal of 24 lines and 80 columns gets to see of a command, until a text has come."
    import fcntl, pty, select, struct, termios, time
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(home)
        os.environ |= dict(TERM="xterm-256color", LINES="24", COLUMNS="80", OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, "-m", "moe_rl.cli", *args])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    seen, limit = [], time.monotonic() + seconds
    while time.monotonic() < limit and not any(until in text for _, text in seen):
        if not select.select([fd], [], [], .2)[0]: continue
        try: part = os.read(fd, 1 << 16)
        except OSError: break
        if not part: break
        seen.append((time.monotonic(), re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part.decode(errors="replace"))))
    os.kill(pid, 9)
    os.close(fd)
    os.waitpid(pid, 0)
    return seen


def test_the_screen_moves_through_a_warm_start(home):
    "On 24 lines of 80 columns, something changes every few seconds from the first second on."
    seen = screen(home, ["run", *flags(dir="runs/screen", env="my_task:Letters", warm_start__steps=400)], 150,
        "step 2 of 2")
    text = "".join(t for _, t in seen)
    assert "warm start: " in text and "step 2 of 2" in text, text[-2000:]
    wide = [line for line in re.split(r"[\r\n]+", text) if len(line) > 80]
    assert not wide, wide[:3]
    times = [at for at, _ in seen]
    assert max(b - a for a, b in zip(times, times[1:])) < 5


def test_a_run_goes_on_without_its_screen(home):
    "`moe-rl run | head -1`: the reader has gone, the run ends as it should."
    args = " ".join(f"'{a}'" for a in flags(dir="runs/unseen", env="my_task:Letters"))
    out = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m moe_rl.cli run {args} | head -1; echo ${{PIPESTATUS[0]}}"], cwd=home,
        capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert out.stdout.splitlines()[-1] == "0" and not out.stderr and (home / "runs" / "unseen" / "model"
        / "config.json").exists(), (out.stdout, out.stderr)


def test_a_locale_without_utf8(home):
    "Files are UTF-8 whatever the machine's locale says."
    (home / "accents.py").write_text(MODULE.replace("'Say the first letter of '", "'Première lettre: '"),
        encoding="utf-8")
    out = subprocess.run([sys.executable, "-m", "moe_rl.cli", "run", *flags(dir="runs/ascii", env="accents:Letters")],
                         cwd=home, capture_output=True,
                         env=os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
                             OMP_NUM_THREADS="1"))
    assert out.returncode == 0 and not out.stderr, out.stderr
    assert (home / "runs" / "ascii" / "report" / "report.md").exists()


def test_display_of_every_row():
    "Rows of a run, with numbers that are missing or not finite, on a terminal and off."
    for terminal in (True, False):
        with open(os.devnull, "w") as null, Display("run", 3, Console(file=null, force_terminal=terminal),
                every=1) as show:
            show(Phase("warm start"))
            show(EvalRow(step=0, exact=.1, interval=(0, .2), prompts=8))
            for step in (1, 2, 3):
                show(StepRow(step=step, reward=.5, exact=float("nan"), grad_norm=float("inf"), trainer_waits=.5))
        with open(os.devnull, "w") as null, Ticker("work", Console(file=null, force_terminal=terminal)) as tick:
            tick("[half] done")
