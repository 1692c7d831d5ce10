"Broken settings and folders: a seeded handful of what `moe-rl bench mutants` draws by the thousand, and the faults that it found."
import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'benchmarks'))
import mutants

from moe_rl.errors import StorageError, UserError
from moe_rl.report import read_run
from moe_rl.train import checkpoint as ck


def test_broken_settings_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here' / 'runs').mkdir(parents=True)
    tally = mutants.Tally()
    mutants.configs(tally, tmp_path / 'here', random.Random(7), 24, lambda i: True)
    assert not tally.shown and tally.cases == 24 and tally.refused > 12


@pytest.mark.parametrize('words, said', [(['--env.params.x', '3'], "no setting 'x'"),
    (['--env.params.terms', 'x'], 'terms is a number'), (['--config', 'none.toml'], 'no such settings file')])
def test_found_by_the_bench(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'fine.toml').write_text(mutants.TINY)
    from moe_rl import cli
    assert cli.main(['run', '--dry-run', '--config', 'fine.toml', *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('name', ['../../outside', '/outside', 'a/../../outside', 'x\0y'])
def test_a_checkpoint_names_no_file_outside(tmp_path, name):
    "A list of files that leads elsewhere is refused, even when what is there is a perfect copy."
    with ck.saving(tmp_path, 1) as folder: ck.write_bytes(folder / 'part', b'data')
    [marker] = tmp_path.rglob(ck.MARKER)
    tree = json.loads(marker.read_bytes())
    tree['files'][name] = tree['files']['part']
    marker.write_text(json.dumps(tree))
    (tmp_path / 'outside').write_bytes(b'data')
    (tmp_path / 'checkpoints' / 'outside').write_bytes(b'data')
    with pytest.raises(ck.CheckpointError, match='no file of this folder'): ck.verify(marker.parent)


def test_a_report_of_altered_logs_names_them(tmp_path):
    (tmp_path / 'config.toml').write_text('rl = [')
    with pytest.raises(UserError, match='not valid TOML'): read_run(tmp_path)
    (tmp_path / 'config.toml').write_text('')
    (tmp_path / 'metrics.jsonl').write_text('{"stepp": 1}\n')
    with pytest.raises(StorageError, match='a line of its logs lacks something'): read_run(tmp_path)
