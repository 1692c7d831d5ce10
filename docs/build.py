"""The site, offline: `python docs/build.py [OUTPUT]` (docs/_build by default) makes pages of nbs/ and of docs/*.md; needs the extra [docs].

Notebooks are shown with their stored outputs; cells marked `#| hide` and lines with directives are left out."""
import json, re, shutil, subprocess, sys
from pathlib import Path
import tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = ['install', 'design', 'errors', 'names']

def notebook(path:Path) -> str: # JSON
    "A notebook without what is only for the machine."
    nb, kept = json.loads(path.read_text()), []
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        said = set(re.findall(r'^#\|\s*(\w+)', source, re.M)) if cell['cell_type'] == 'code' else set()
        if said & {'hide', 'default_exp'}: continue
        if cell['cell_type'] == 'code':
            cell['source'] = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip('\n')
            cell['metadata'] = dict(tags=['remove-input']) if 'echo' in said else {}
            # links of a table that was computed
            for data in (o['data'] for o in cell['outputs'] if 'text/markdown' in o.get('data', {})):
                data['text/markdown'] = re.sub(r'(\]\((?!https?:)[^)#]+)\.ipynb\b', r'\1.html',
                    ''.join(data['text/markdown']))
        else:   # pages of docs/ lie beside the notebooks; what is no page is named without a link
            text = re.sub(r'\]\(\.\./docs/(\w+\.md)\)', r'](\1)', source)
            cell['source'] = re.sub(r'\[([^\]]+)\]\(\.\./(?:configs/\S+?|LICENSE)\)', r'\1', text)
        kept.append(cell)
    return json.dumps(nb | dict(cells=kept))

def contents() -> str: # reStructuredText of the table of contents
    "The root page: hand-written pages, then every folder of notebooks."
    tree = lambda title, names: f'\n.. toctree::\n   :maxdepth: 1\n   :caption: {title}\n\n' + ''.join(f'   {n}\n'
        for n in names)
    text = 'moe_rl\n======\n' + tree('moe_rl', ['index', *PAGES, 'results'])
    for folder, title in tables.FOLDERS.items():
        text += tree(title, [p.with_suffix('').as_posix() for f, p, *_ in tables.notebooks() if f == folder])
    return text

def collect(source:Path):
    "Everything that Sphinx reads, in one folder."
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for path in [ROOT/'nbs'/'index.ipynb', *(ROOT/'nbs'/p for _, p, *_ in tables.notebooks())]:
        target = source/path.relative_to(ROOT/'nbs')
        target.parent.mkdir(exist_ok=True)
        target.write_text(notebook(path))
    for page in PAGES:
        (source/f'{page}.md').write_text((ROOT/'docs'/f'{page}.md').read_text().replace('](../nbs/', ']('))
    (source/'results.md').write_text('# Results\n\nRead from `benchmarks/results/`. Each section is one run of one '
                                     'command.\n\n' + tables.results_page())
    (source/'toc.rst').write_text(contents())
    shutil.copy(ROOT/'docs'/'conf.py', source)
    shutil.copytree(ROOT/'docs'/'_static', source/'_static')

if __name__ == '__main__':
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT/'docs'/'_build'
    collect(out/'source')
    r = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', out/'source',
        out/'html'])
    if r.returncode: sys.exit(r.returncode)
    print(out/'html'/'index.html')
