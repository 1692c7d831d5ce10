"""Environments that misbehave in every way we could think of: `score` does what the model's text says, `problem` and
`reply` what their parameters say."""
import asyncio, ctypes, os, random, re, signal, sys, threading, time
from moe_rl.rollout.environments import Environment, Task


class Rude:
    "An object that misbehaves when it is looked at."
    def __init__(self, how): self.how = how
    def __float__(self):
        if self.how == "hang": time.sleep(10**6)
        raise SystemExit(3)
    def __repr__(self): raise KeyboardInterrupt
    __str__ = __repr__


class Mute(Exception):
    def __str__(self): raise SystemExit(4)


def raising(error):
    def f(self): raise error
    return f

def giving(value): return lambda self: value

def recursion(self): return recursion(self)

class Kinds(Environment):
    "A task of numbers; each kind of misbehaviour is a method."
    name = "kinds"
    def __init__(self): self.gate, self.lock, self.calls = asyncio.Semaphore(2), threading.Lock(), 0
    def problem(self, key): return Task(env=self.name, prompt=f"say {key % 99991}", answer=str(key % 99991), data=[])
    def score(self, task, turns): return getattr(self, turns[-1])()
    def fine(self): return .5
    async def judged(self):
        async with self.gate: await asyncio.sleep(.002)
        return .5
    def own_loop(self): return asyncio.run(asyncio.sleep(.001, .5))

    # it raises
    error, system_exit, interrupt, generator_exit, cancelled = map(raising,
        (RuntimeError("two\nlines"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()))
    mute, base, memory_error, surrogate_message = map(raising,
        (Mute(), BaseException("base"), MemoryError(), ValueError("\ud83d")))
    recursion = recursion
    async def error_async(self): raise OSError("the judge is away")
    async def exit_async(self): sys.exit(1)
    async def cancel_self(self):
        asyncio.current_task().cancel()
        await asyncio.sleep(1)

    # it gives no reward
    nan, infinite, huge, huge_int, text, number_text, raw, true, nothing, many, complex_number, surrogate = map(giving,
        (
        float("nan"), float("-inf"), 1e300, 10**5000, "good", " 3 ", b"2", True, None, [1.0], 1j, "\ud83d"))
    rude, rude_hang = map(giving, (Rude("exit"), Rude("hang")))

    # it does not come back
    def sleep(self): time.sleep(10**6)
    async def sleep_async(self): await asyncio.sleep(10**6)
    async def never(self): await asyncio.get_running_loop().create_future()
    async def stubborn(self):
        while True:
            try: await asyncio.sleep(10**6)
            except asyncio.CancelledError: pass
    def deadlock(self):
        self.lock.acquire()
        self.lock.acquire()
    def spin(self):
        while True: pass
    async def block_loop(self): time.sleep(10**6)
    async def spin_loop(self):
        while True: pass
    def regex(self): return re.match(r"(a+)+$", "a"*60 + "!")
    async def regex_async(self): return re.match(r"(a+)+$", "a"*60 + "!")
    def power(self): return 9**9**9**9
    def stop_loop(self):
        async def stop():
            asyncio.get_running_loop().stop()
            await asyncio.sleep(10**6)
        return stop()

    # it ends or breaks its process
    def leave(self): os._exit(0)
    async def leave_async(self): os._exit(3)
    def abort(self): os.abort()
    def segfault(self): ctypes.string_at(0)
    def kill_itself(self): os.kill(os.getpid(), signal.SIGKILL)
    def kill_all(self):
        os.kill(-1, signal.SIGKILL)
        time.sleep(10)
    def stop_itself(self): os.kill(os.getpid(), signal.SIGSTOP)
    def close_files(self):
        os.closerange(0, 256)
        return .5
    def memory(self): return len(bytearray(10**12))
    def memory_slow(self):
        held = []
        while True: held.append(bytearray(1 << 26))
    def fork_return(self):
        os.fork()
        return .5
    def fork_hang(self):
        if not os.fork():
            os.setsid()
            time.sleep(10**6)
        return .5
    def flood(self):
        while True: os.write(1, b"x"*65536)
    def threads(self):
        for _ in range(20): threading.Thread(target=time.sleep, args=(10**6,), daemon=True).start()
        return .5
    def forge(self):
        for fd in range(3, 20):
            try: os.write(fd, b"\x00\x00\x00\x05xxxxx")
            except OSError: pass
        return .5
    def big(self): return "x"*(100 << 20)

FINE = {"fine", "judged", "own_loop", "fork_return", "fork_hang", "threads"}        # strange, and right
MAY = {"close_files", "forge", "memory"}                                             # either end will do
KINDS = [k for k, v in vars(Kinds).items() if callable(v) and k not in ("problem", "score", "__init__")
    and not k.startswith("_")]


class Wild(Kinds):
    "Misbehaves now and then, in the function `where`; `rate` 0: never."
    name = "wild"
    def __init__(self, where="score", rate=.1, kinds=()):
        super().__init__()
        self.where, self.rate, self.kinds = where, rate, list(kinds)
    def strike(self): return random.random() < self.rate
    def problem(self, key):
        if self.where == "problem" and key % 1000 < 1000*self.rate:
            return getattr(self, self.kinds[key // 1000 % len(self.kinds)])()
        return super().problem(key)
    async def reply(self, task, turns):
        if self.where == "reply" and len(turns) < 3:
            if self.strike(): return await self.settle()
            return "go on"
        return None
    async def score(self, task, turns):
        if self.where == "score" and self.strike(): return await self.settle()
        return float(len(turns[-1]) % 3)
    async def settle(self):
        value = getattr(self, random.choice(self.kinds))()
        return await value if asyncio.iscoroutine(value) else value
    def many(self): return [1.0]
    def long_prompt(self): return Task(env=self.name, prompt="say" + " x"*20000, answer="1")
    def int_prompt(self): return Task(env=self.name, prompt=5)
    def int_answer(self): return Task(env=self.name, prompt="say 5", answer=5)
    def half_emoji(self): return Task(env=self.name, prompt="say \ud83d", answer="1")
    def endless_prompt(self): return Task(env=self.name, prompt="x"*(64 << 20))
    def endless_text(self): return "x"*(64 << 20)
    def some_int(self): return 5
