"Sphinx settings of docs/build.py. Pages need no network: formulas become MathML when the site is built."
from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = html_title = "moe_rl"
extensions = ["myst_nb"]
root_doc = "index"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["moe_rl.css"]
html_favicon = "_static/icon.svg"
html_show_sphinx = html_show_copyright = html_copy_source = False
html_theme_options = dict(light_css_variables={"color-brand-primary": "#1f5fa8",
    "color-brand-content": "#1f5fa8"}, dark_css_variables={"color-brand-primary": "#6fb1f5",
    "color-brand-content": "#6fb1f5"})
pygments_style, pygments_dark_style = "friendly", "github-dark"
nb_execution_mode = "off"                                    # stored outputs, which nbdev-test keeps true
nb_merge_streams = True
nb_render_markdown_format = "gfm"                           # tables in outputs
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"]
html_math_renderer = "mathml"
smartquotes = False                                          # messages and options are shown as they are typed

def inline(self, node):
    self.body.append(convert(node.astext()))
    raise SkipNode

def display(self, node):
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode

def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return dict(parallel_read_safe=True)
