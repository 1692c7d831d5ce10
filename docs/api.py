"The reference: public names with signatures, comments and docstrings, read from the source without importing it."
import ast
import functools
import re
from pathlib import Path
import tables

ROOT = Path(__file__).resolve().parents[1]

def public(tree:ast.Module) -> set[str]:
    "Names in `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return {e.value for e in node.value.elts}
    return set()

def head(node, lines:list[str]) -> str:
    "A definition down to its body, with the comments that explain its parameters."
    first, last = node.lineno - 1, node.body[0].lineno - 1
    if isinstance(node, ast.ClassDef): return class_head(node, lines)
    if node.body[0].lineno == node.end_lineno and first == last:
        text = lines[first][:node.body[0].col_offset]
    elif last == first or lines[last][:node.body[0].col_offset].strip():
        text = "\n".join([*lines[first:last], lines[last].encode()[:node.body[0].col_offset].decode()])
    else: text = "\n".join(lines[first:last])
    return dedent(text.rstrip())

def dedent(text:str) -> str:
    "Without the indentation of the first line."
    margin = len(text) - len(text.lstrip())
    return "\n".join(l[margin:] if l[:margin].isspace() else l for l in text.splitlines())

def class_head(node:ast.ClassDef, lines:list[str]) -> str:
    "The line of a class and its fields, each with the comment beside it."
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    stop = next(i for i in range(node.lineno - 1, node.end_lineno) if re.search(r":\s*(#.*)?$|:\s", lines[i]))
    out = [re.sub(r"(:)\s+(pass|\.\.\.|['\"].*)$", r"\1", l) for l in lines[start:stop + 1]]
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and not getattr(field.target, "id", "_").startswith("_"):
            out += lines[field.lineno - 1:field.end_lineno]
    return dedent("\n".join(out))

def docstring(node) -> str:
    "A docstring as Markdown; indented examples stay as they are."
    return ast.get_docstring(node) or ""

def definitions(tree:ast.Module) -> list[tuple[ast.AST, list[ast.AST]]]: # node, its methods
    "Public functions and classes; methods that `@patch` adds are with their class."
    names, out, classes = public(tree), [], {}
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): continue
        if any(ast.unparse(d).split("(")[0].startswith("patch") for d in node.decorator_list):
            of = node.args.args[0].annotation
            if of is not None and ast.unparse(of) in classes and node.name[0] != "_":
                classes[ast.unparse(of)].append(node)
        elif node.name in names:
            methods = [m for m in node.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef))
                and m.name[0] != "_"] if isinstance(node, ast.ClassDef) else []
            classes[node.name] = methods
            out.append((node, methods))
    return out

@functools.cache
def modules() -> dict[str, tuple[Path, Path, str]]: # 'rl.loss' -> file, its notebook below nbs/, title of the notebook
    "Every module that a notebook exports, in reading order."
    return {module: (ROOT/"moe_rl"/(module.replace(".", "/") + ".py"), path, title)
        for _, path, title, _, module in tables.notebooks() if module}

def where() -> dict[str, list[str]]: # public name -> modules that define it
    "In which modules a public name is defined."
    out = {}
    for module, (path, *_) in modules().items():
        for node, _ in definitions(ast.parse(path.read_text())): out.setdefault(node.name, []).append(module)
    return out

def anchor(name:str) -> str: return f'<span class="anchor" id="{name}"></span>'

def entry(module:str, node, methods, lines:list[str], notebook:Path) -> list[str]: # lines of Markdown
    "One public name: its signature, what it says about itself, and where it is explained."
    link = f"../{notebook.with_suffix('.html').as_posix()}#def-{node.name}"
    name = f"moe_rl.{module}.{node.name}"
    out = [anchor(name), "", f"## {node.name}", "", f'<p class="source"><a href="{link}">in its notebook</a></p>', "",
        "```python", head(node, lines), "```", ""]
    if doc := docstring(node): out += [doc, ""]
    if methods: out += ['<div class="methods">', ""]
    for m in methods:
        out += [anchor(f"{name}.{m.name}"), "", "```python", head(m, lines), "```", ""]
        if doc := docstring(m): out += [doc, ""]
    return [*out, "</div>", ""] if methods else out

def module_page(module:str) -> str: # Markdown
    "The page of a module."
    path, notebook, title = modules()[module]
    tree, lines = ast.parse(path.read_text()), path.read_text().splitlines()
    out = ["---", "orphan: true", "---", "", f"# moe_rl.{module}", "",
        f"> {' '.join((ast.get_docstring(tree) or module).split())}", "",
        f"Explained, built and tested in [{title}](../{notebook.as_posix()}); [all modules](index.md).", ""]
    for node, methods in definitions(tree): out += entry(module, node, methods, lines, notebook)
    return "\n".join(out)

def index_page() -> str: # Markdown
    "All modules, by folder, with the names that each offers."
    out = ["# Reference", "", "Every public name, from the source of the package. `import moe_rl` offers the ten that "
        "a user needs first; everything else is imported from its module.", "", "| module | names |", "|---|---|"]
    last = None
    for module, (path, notebook, _) in modules().items():
        if notebook.parent.name != last: out.append(f"| **{tables.FOLDERS[notebook.parent.name][0]}** | |")
        last = notebook.parent.name
        names = [f'<a href="{module}.html#moe_rl.{module}.{n.name}"><code>{n.name}</code></a>'
            for n, _ in definitions(ast.parse(path.read_text()))]
        out.append(f"| [moe_rl.{module}]({module}.md) | {' '.join(names) or '-'} |")
    return "\n".join([*out, ""])
