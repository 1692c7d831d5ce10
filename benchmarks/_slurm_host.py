"""A real Slurm of two nodes on this machine, on loopback, for as long as it is needed: its own munge, ports and folder,
so that it touches no other. Needs root and Debian's slurm-wlm and munge."""
import os, shutil, signal, socket, subprocess, time
from contextlib import contextmanager
from pathlib import Path

NEEDS = ("slurmctld", "slurmd", "munged", "sbatch")
CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock
CredType=cred/munge
StateSaveLocation={dir}/ctld
SlurmdSpoolDir={dir}/d.%n
SlurmctldPidFile={dir}/ctld.pid
SlurmdPidFile={dir}/d.%n.pid
SlurmctldLogFile={dir}/log/ctld.log
SlurmdLogFile={dir}/log/d.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=10
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    "Why no Slurm can be started here; empty when it can."
    gone = [n for n in NEEDS if not shutil.which(n, path=os.environ["PATH"] + ":/usr/sbin")]
    if gone: return f"{', '.join(gone)} not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "slurmd wants to be root"


def says(*words: str) -> str: return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def free_ports() -> list[int]:
    "Three ports in a row that nobody listens on."
    for first in range(17000 + os.getpid() % 1000 * 3, 30000, 3):
        try:
            for p in range(first, first + 3):
                with socket.socket() as s: s.bind(("", p))
            return list(range(first, first + 3))
        except OSError: continue
    raise RuntimeError("no three free ports")


@contextmanager
def slurm(folder):
    "A cluster while the block runs; `SLURM_CONF` is set to it."
    folder = Path(folder).resolve()
    for d in (folder, folder / "ctld", folder / "log"): d.mkdir(parents=True, exist_ok=True)
    conf, before = folder / "slurm.conf", os.environ.get("SLURM_CONF")
    conf.write_text(CONF.format(host=socket.gethostname(), ports=free_ports(), dir=folder, cores=os.cpu_count()))
    key = folder / "munge.key"
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as f: f.write(os.urandom(128))
    os.environ["SLURM_CONF"] = str(conf)
    old_path, os.environ["PATH"] = os.environ["PATH"], os.environ["PATH"] + ":/usr/sbin"
    try:
        subprocess.run(["munged", "--force", f"--socket={folder}/munge.sock", f"--key-file={key}",
            f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed",
            f"--log-file={folder}/log/munge.log"], check=True, umask=0o022)
        for words in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]): subprocess.run(words, check=True)
        limit = time.monotonic() + 60
        while says("sinfo", "-h", "-t", "idle", "-o", "%D") != "2":
            if time.monotonic() > limit: raise RuntimeError(f"Slurm did not come up; see {folder}/log")
            time.sleep(.5)
        yield folder
    finally:
        subprocess.run(["scancel", "--me"], capture_output=True)
        limit = time.monotonic() + 40
        while says("squeue", "-h") and time.monotonic() < limit: time.sleep(.5)
        for pid in folder.glob("*.pid"):
            try: os.kill(int(pid.read_text()), signal.SIGTERM)
            except (ProcessLookupError, ValueError): pass
        os.environ["PATH"] = old_path
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
