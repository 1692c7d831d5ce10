"""Environments in processes of their own: what a call may do to others, what an answer that is code may do to
anybody, and what is checked where it is made."""
import asyncio, os, signal, socket, subprocess, sys
from collections import Counter
import pytest
from moe_rl.errors import UserError
from moe_rl.rollout.environments import Environment, Mixture, Task, load_env, usable_reward
from moe_rl.rollout.grading import grade
from moe_rl.rollout.guard import Doors, EnvError, Guard, Outage, Prints, open_envs, variables
from moe_rl.rollout.sandbox import isolation

MODULE = '''
import asyncio, os, re, time
from moe_rl.rollout.environments import Environment, Task
class Odd(Environment):
    name = 'odd'
    def __init__(self): self.gate = asyncio.Semaphore(1)
    def problem(self, key):
        if key % 40 == 3: raise KeyError('row')
        if key % 40 == 5: return Task(env=self.name, prompt=None)
        return Task(env=self.name, prompt=f'say {key % 5000}', answer='x', data={(1, 2): {3}})
    def score(self, task, turns): return getattr(self, turns[-1])(task)
    def fine(self, task): return 1
    def data(self, task): old = dict(task.data); task.data.clear(); return float(old == {(1, 2): {3}})
    async def judged(self, task):
        async with self.gate: await asyncio.sleep(.002)
        return 1
    def own_loop(self, task): return asyncio.run(asyncio.sleep(0, 1))
    def sleep(self, task): time.sleep(10**6)
    def regex(self, task): return re.match(r'(a+)+$', 'a'*60 + '!')
    async def block(self, task): time.sleep(10**6)
    def leave(self, task): os._exit(0)
    def fork(self, task): os.fork(); return 1
    def text(self, task): return ' 3 '
'''

@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    (folder/"odd_env.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    env = open_envs([dict(name="odd_env:Odd")], limit=1.)
    yield env
    env.host.close()
    sys.path.remove(str(folder))

def test_closing_ends_what_waits(tmp_path, monkeypatch):
    "A call that is under way, or waits for the processes to come up, is cancelled and not left to be destroyed."
    (tmp_path/"late_env.py").write_text(MODULE.replace("key % 40 == 3", "not time.sleep(10**6)"))
    monkeypatch.syspath_prepend(str(tmp_path))
    env = open_envs([dict(name="late_env:Odd")])
    known = env.host.send(env.host.pass_on("sample", env.host.labels[0], (0,), 60.))
    env.host.close()
    assert known.cancelled() or known.exception(timeout=5)
    assert not [t for t in asyncio.all_tasks(env.host.loop) if not t.done()]

async def ends(guard, task, texts):
    async def one(text):
        try: return await guard.score(task, [text])
        except EnvError as e: return e.reason
    return await asyncio.gather(*map(one, texts))

@pytest.mark.parametrize("fault, reason", [("sleep", "env_timeout"), ("regex", "env_timeout"), ("block", "env_timeout"),
    ("leave", "env_error"), ("fork", 1.0), ("text", "env_reward"), ("missing", "env_error")])
def test_a_call_costs_nobody_else_anything(odd, fault, reason):
    "Plain and async calls beside one that hangs, holds the interpreter, blocks the shared loop, or ends the process."
    async def main():
        guard = Guard(odd, timeout=.5, patience=0)
        task = await guard.sample(1)
        texts = ["fine", "judged", "judged", fault, "own_loop", "judged", "data", "fine", "judged"]
        for wave in range(2): assert await ends(guard, task, texts) == [reason if t == fault else 1.0 for t in texts]
        assert guard.failures == ({} if reason == 1.0 else {reason: 2})
    asyncio.run(main())

def test_waiting_for_a_place_is_not_on_the_clock(odd):
    async def main():
        guard = Guard(odd, timeout=.3, width=2, patience=0)
        return Counter(await ends(guard, await guard.sample(1), ["judged"]*200))
    assert asyncio.run(main()) == {1.0: 200}

def test_problems_that_can_not_be_drawn_are_skipped(odd):
    assert len(odd.held_out(20)) == 20 and 90 <= len(odd.train_examples(100)) < 100

def test_most_problems_broken_is_one_line(tmp_path, monkeypatch):
    (tmp_path/"broken_env.py").write_text("from moe_rl.rollout.environments import Environment, Task\nclass "
                                          "Broken(Environment):\n    name = 'broken'\n    def problem(self, key): "
                                          "return Task(env='broken', prompt='x', answer=5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    env = open_envs([dict(name="broken_env:Broken")])
    with pytest.raises(UserError, match="env broken: most of its problems can not be drawn, the last: TypeError: "
                                        "answer of a task must be text or None, got int .5."):
        env.held_out(4)
    env.host.close()


# ---- answers that are code

@pytest.mark.skipif(bool(isolation()), reason="this system isolates no process")
def test_an_answer_that_is_code_finds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_RL_TOKEN", "secret")
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"config.toml").write_text("secret")
    listening, hits = socket.create_server(("127.0.0.1", 0)), []
    before = signal.signal(signal.SIGUSR1, lambda *a: hits.append(1))
    log = tmp_path/"run"/"environments.log"
    tries = [f"open({str(tmp_path/'touched')!r}, 'w')", "print(os.environ['MOE_RL_TOKEN'])",
             f"print(open('/proc/{os.getpid()}/environ').read())",
             f"print(open({str(tmp_path/'run'/'config.toml')!r}).read())",
             f"socket.create_connection(('127.0.0.1', {listening.getsockname()[1]}), 1)", f"os.kill({os.getpid()}, 10)",
             "os.kill(os.getppid(), 10)"]
    code = "import os, socket\n" + "".join(f"try: {t}\nexcept BaseException: pass\n"
        for t in tries) + "print('it ran', flush=True)"
    async def main():
        guard = Guard(Doors([dict(name="string_insertion")], hides=[str(tmp_path/"run")], log=str(log)), timeout=2.,
            patience=0)
        task = await guard.sample(0)
        assert await guard.score(task, [task.answer]) == 1.0
        try: await guard.score(task, [f"exec({code!r})"])
        except EnvError: pass
        assert await ends(guard, task, ["9**9**9**9", task.answer]) == ["env_timeout", 1.0]
        guard.close()
    asyncio.run(main())
    signal.signal(signal.SIGUSR1, before)
    listening.setblocking(False)
    with pytest.raises(BlockingIOError): listening.accept()
    said = log.read_text()
    assert "it ran" in said and "secret" not in said and not hits and not (tmp_path/"touched").exists()

def test_without_isolation_tasks_that_execute_are_refused():
    code = "import sys\nfrom moe_rl.rollout.guard import open_envs\nopen_envs([dict(name='string_insertion')])"
    off = ["unshare", "-r", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh"]
    try: r = subprocess.run([*off, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    except FileNotFoundError: pytest.skip("no unshare")
    if "unshare" in r.stderr.splitlines()[0]: pytest.skip("namespaces are off anyway")
    assert "UserError: env string_insertion: its scorer executes what the model writes, and this system isolates no process" in r.stderr

def test_a_process_of_environments_gets_none_of_the_runs_variables(monkeypatch):
    monkeypatch.setenv("MOE_RL_TOKEN", "secret")
    monkeypatch.setenv("MY_API_KEY", "secret")
    assert "secret" not in variables(False).values() and variables(True)[
        "MY_API_KEY"] == "secret" and "MOE_RL_TOKEN" not in variables(True)

def test_a_stock_scorer_is_always_isolated():
    with pytest.raises(UserError, match="a stock scorer is always isolated"): Doors([dict(name="gcd", isolate="none")])


# ---- what passes the check must work

def test_numbered_problems_two_levels_and_few_problems():
    class Rows(Environment):
        name = "rows"
        def sample(self, i): return Task(env=self.name, prompt=f"row {i % 300}", answer="!")
    mix = Mixture([Rows(), load_env(dict(name="calculator", params=dict(terms=1))),
        load_env(dict(name="calculator", params=dict(terms=4)))])
    drawn, held = [mix.sample(i) for i in range(400)], mix.held_out(12)
    assert {t.env for t in drawn} == {"rows", "calculator", "calculator-2"} == {t.env for t in held} and not {t.prompt
        for t in drawn} & {t.prompt for t in held}
    class Few(Environment):
        name = "few"
        def problem(self, key): return Task(env=self.name, prompt=f"item {key % 3}", answer="!")
    few = Few()
    with pytest.raises(UserError, match="few: none of its 3 prompts is held out: set held_out = ") as e: few.held_out(1)
    few.held_out_share = float(str(e.value).split("held_out = ")[1].split()[0])     # the remedy that it names
    assert few.held_out(1) and {few.sample(i).prompt for i in range(40)}

def test_types_are_checked_where_they_are_made():
    for bad in (dict(prompt=None), dict(prompt="x", answer=5), dict(prompt=b"x")):
        with pytest.raises(TypeError, match="of a task must be text"): Task(env="a", **bad)
    assert Task(env="a", prompt="\ud83d").prompt == "\ufffd"
    for bad in (" 3 ", b"2", True, None, float("nan"), 1e300, 10**400):
        with pytest.raises(ValueError, match="reward is"): usable_reward(bad)


# ---- outages and grades

def test_an_outage_is_waited_out(monkeypatch):
    monkeypatch.setattr(Outage, "LONGEST", .01)
    class Judge(Environment):
        name, calls = "judge", 0
        def problem(self, key): return Task(env=self.name, prompt="?")
        async def score(self, task, turns):
            self.calls += 1
            if 20 <= self.calls < 60: raise ConnectionError("refused")
            return 1.0
    async def main(patience):
        guard = Guard(Judge(), patience=patience, width=2)
        return Counter(await ends(guard, await guard.sample(0), ["x"]*100))
    assert asyncio.run(main(60.))["env_error"] <= 12 and asyncio.run(main(0.))["env_error"] == 40

def test_a_share_and_a_mean_are_two_things():
    report = grade([(None, 10.), (None, 0.), (None, -1.)], 1)
    assert report["exact"] is None and report["pass_at_k"] == {} and report["score"] == 3. and report["score_interval"][
        0] < 0
    assert grade([(None, .9)]*9, 1)["pass_at_k"] == {} and grade([(1., .5), (0., .5)], 1)["pass_at_k"] == {"1": .5}


def python_for_all():
    "A Python of this version that any user may start, or None."
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{name}", f"/usr/local/bin/{name}"):
        try: r = subprocess.run([python, "-c", "import sys; print(sys.version_info[:2])"], user=65534, group=65534,
            extra_groups=[], capture_output=True, text=True)
        except OSError: continue
        if r.stdout.strip() == str(sys.version_info[:2]): return python

@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user: wants the superuser")
@pytest.mark.skipif(isolation() != "", reason="no isolation on this system")
def test_an_ordinary_user_is_isolated_too(tmp_path):
    if not (python := python_for_all()): pytest.skip("no Python of this version that an ordinary user may start")
    code = ("import asyncio, os\nfrom moe_rl.rollout.guard import Guard, open_envs\n"
        "env = open_envs([dict(name='string_insertion')], say=print)\nguard = Guard(env, timeout=5., patience=0)\n"
        "async def main():\n    task = await guard.sample(0)\n"
        "    return [await guard.score(task, [a]) for a in (task.answer, \"open('/tmp/x', 'w')\", 'os._exit(0)')]\n"
        "print(os.getuid(), asyncio.run(main()))\nenv.host.close()\n")
    places = os.pathsep.join(p for p in sys.path if p)
    r = subprocess.run([python, "-c", code], user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True,
        text=True, timeout=60, env=dict(PATH=os.environ["PATH"], HOME="/tmp", PYTHONPATH=places))
    if "PermissionError" in r.stderr or "ModuleNotFoundError" in r.stderr:
        pytest.skip("an ordinary user may not read this environment")
    assert r.stdout == "65534 [1.0, 0.0, 0.0]\n", (r.stdout, r.stderr[-500:])


def test_what_a_process_prints_is_kept_where_its_log_cannot_be_written(tmp_path):
    "The folder of a run that was refused is gone while a process of its environments still prints."
    async def heard():
        wrong, loop = [], asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: wrong.append(context))
        read, write = os.pipe()
        prints = Prints(read, str(tmp_path/"gone"/"environments.log"))
        for words in (b"first ", b"second"):
            os.write(write, words)
            await asyncio.sleep(.3)
        prints.close()
        os.close(write)
        return prints.words(), wrong
    assert asyncio.run(heard()) == ("first second", [])
