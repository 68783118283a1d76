"""Shows the examples in docstrings as code on the documentation's site (mkdocs.yml)."""

from typing import Any

from griffe import Docstring, Extension, Object


class Doctests(Extension):
    """Fences the paragraphs of docstrings that begin with a prompt."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of an object before it is read as Markdown."""
        if obj.docstring is not None:
            obj.docstring = Docstring(
                "\n\n".join(map(_fenced, obj.docstring.value.split("\n\n"))),
                lineno=obj.docstring.lineno,
                endlineno=obj.docstring.endlineno,
                parent=obj,
            )


def _fenced(paragraph: str) -> str:
    return f"```pycon\n{paragraph}\n```" if paragraph.startswith(">>> ") else paragraph
