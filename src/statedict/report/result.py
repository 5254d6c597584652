"""What every result has in common: facts that can be shown anywhere."""

from __future__ import annotations

from statedict.report.document import Document

__all__ = ["Result"]


class Result:
    """A result of an operation. A subclass says ``to_dict()`` and ``document()``; the rest follows."""

    __slots__ = ()

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready, with a ``schema``."""
        raise NotImplementedError

    def document(self) -> Document:
        """The facts as a document for people."""
        raise NotImplementedError

    def __str__(self) -> str:
        from statedict.report.text import render

        return render(self.document()).rstrip("\n")

    def to_markdown(self) -> str:
        """The document as GitHub-flavoured Markdown."""
        from statedict.report.markdown import render

        return render(self.document())

    def to_html(self) -> str:
        """The document as one page without anything from outside; made for a browser, light or dark."""
        from statedict.report.html import page

        return page(self.document())

    def _repr_html_(self) -> str:
        """The document as a piece of HTML for notebooks."""
        from statedict.report.html import fragment

        return fragment(self.document())
