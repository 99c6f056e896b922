"""`llms.txt`: the pages and what each is about, for readers that are programs. See llmstxt.org."""

import pathlib

from docutils import nodes


def first_sentence(doctree):
    """The first sentence of the first paragraph that is text of the page."""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section | nodes.document):
            text = " ".join(paragraph.astext().split())
            head, stop, _ = text.partition(". ")
            return head + stop.strip()
    return ""


def write_llms(app, exception):
    """Write `llms.txt` into the root of the HTML pages, which are listed in the order of the table of contents."""
    if exception or app.builder.format != "html":
        return
    env, root = app.env, app.config.root_doc
    order = [root]
    for name in order:
        order += [
            child
            for child in env.toctree_includes.get(name, ())
            if child not in order
        ]
    lines = [
        f"# {env.titles[root].astext()}",
        "",
        f"> {first_sentence(env.get_doctree(root))}",
        "",
    ]
    lines += ["## Pages", ""]
    for name in order[1:]:
        about = first_sentence(env.get_doctree(name))
        uri = app.builder.get_target_uri(name)
        lines.append(
            f"- [{env.titles[name].astext()}]({uri})"
            + (f": {about}" if about else "")
        )
    pathlib.Path(app.outdir, "llms.txt").write_text(
        "\n".join([*lines, ""]), encoding="utf-8"
    )


def setup(app):
    """Called by Sphinx."""
    app.connect("build-finished", write_llms)
    return {"parallel_read_safe": True}
