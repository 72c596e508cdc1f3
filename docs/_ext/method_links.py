"""The name of a method, as code in a page, leads to the page of the method."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from made_pages import page_of
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

from offpolicy.registry import method_names


class MethodLinks(SphinxPostTransform):
    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        names = set(method_names())
        for node in list(self.document.findall(nodes.literal)):
            name = node.astext()
            if name not in names or isinstance(node.parent, nodes.reference):
                continue
            page = page_of(name)
            if page == self.env.docname:
                continue
            link = nodes.reference(
                "", "", internal=True, refuri=self.app.builder.get_relative_uri(self.env.docname, page)
            )
            node.replace_self(link)
            link += node


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_post_transform(MethodLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
