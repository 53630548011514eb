"""Running text out of Markdown, HTML, LaTeX and PDF, each through a library that parses it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolmlx.errors import DataError

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

_BLOCKS = frozenset(
    [
        "address",
        "article",
        "blockquote",
        "caption",
        "dd",
        "div",
        "dl",
        "dt",
        "figcaption",
        "figure",
        "header",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "table",
        "tbody",
        "tfoot",
        "thead",
        "tr",
        "ul",
    ]
)
_DROPPED = frozenset(
    [
        "aside",
        "button",
        "canvas",
        "footer",
        "form",
        "head",
        "iframe",
        "nav",
        "noscript",
        "script",
        "select",
        "style",
        "svg",
        "template",
    ]
)
_FRAMES = frozenset({"ol", "table", "tbody", "thead", "tr", "ul"})
"""Elements in which blank text is the layout of the source."""
_CELLS = frozenset({"td", "th"})
_MATH = re.compile(r"\$\$.+?\$\$|(?<![\\$])\$(?!\s)[^$\n]+(?<!\s)\$(?!\d)", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
# Roles of MyST and Sphinx: labels and citations say nothing in running text, other roles show their content.
_SILENT_ROLE = re.compile(r"[ \t]*:(?:label|cite\w*|width|height):`[^`\n]*`")
_ROLE = re.compile(r":[a-z]+:`([^`\n]*)`")
_PARAGRAPHS = dict.fromkeys(("part", "chapter", "section", "subsection", "subsubsection", "paragraph"), "*[{") | {
    "caption": "[{"
}
"""LaTeX macro -> its arguments; the last becomes a paragraph of its own."""
_INLINE = {
    **dict.fromkeys(
        ("texttt", "textsc", "textsf", "textrm", "textup", "underline", "mbox", "emph", "textbf", "textit"), "{"
    ),
    **dict.fromkeys(("textcolor", "href", "hyperref"), "[{{"),
}
"""LaTeX macro -> its arguments; the last stays in the line."""
_SILENT = {
    **dict.fromkeys(("cite", "citep", "citet", "citealp", "citealt", "textcite", "parencite"), "*[[{"),
    **dict.fromkeys(("citeauthor", "citeyear", "ref", "eqref", "pageref", "cref", "Cref", "autoref"), "*{"),
    **dict.fromkeys(("label", "bibliography", "bibliographystyle", "footnotemark", "thispagestyle"), "{"),
    **dict.fromkeys(("vspace", "hspace"), "*{"),
    **dict.fromkeys(("setlength", "renewcommand", "addtolength", "setcounter"), "{{"),
    **dict.fromkeys(("newcommand", "providecommand"), "*{[[{"),
    "includegraphics": "[{",
    "url": "{",
}
_NO_TEXT = [
    "tabular",
    "tabular*",
    "tabularx",
    "longtable",
    "tikzpicture",
    "thebibliography",
    "lstlisting",
    "verbatim",
    "algorithm",
    "algorithmic",
]
_HELD = "\ue000"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]")
_PAGE_NUMBER = re.compile(r"(?:page\s*)?\d{1,4}(?:\s*(?:/|of)\s*\d{1,4})?", re.IGNORECASE)
_MIN_RUNNING_PAGES = 4
"""Fewest pages on which a line must stand before it may be a running head."""


def tidy(text: str) -> str:
    """Return a text in NFC, without control characters, trailing blanks and runs of blank lines."""
    text = _CONTROL.sub("", unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t\xa0]+\n", "\n", text)).strip()


def markdown_text(source: str) -> str:
    """Return the text of Markdown as a reader sees it: no link targets, images or marks; mathematics as written."""
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise _missing("Markdown", "markdown-it-py") from error

    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match[0])
        return f"{_HELD}{len(held) - 1}{_HELD}"

    source = _ROLE.sub(r"\1", _SILENT_ROLE.sub("", _FRONT_MATTER.sub("", source)))
    # Markdown would read the backslashes and underscores of formulas as its own.
    html = MarkdownIt("commonmark").enable("table").render(_MATH.sub(hold, source))
    return re.sub(f"{_HELD}(\\d+){_HELD}", lambda match: held[int(match[1])], html_text(html))


def html_text(source: str) -> str:
    """Return the text of an HTML page: its article or main part where it has one, without menus and scripts.

    Raises:
        DataError: elements in elements beyond Python's stack.
    """
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError as error:
        raise _missing("HTML and Markdown", "selectolax") from error

    page = LexborHTMLParser(source)
    articles = page.css("article")
    for header in page.css("header"):  # of the page; that of an article holds its title
        if not _within(header, ("article", "main")):
            header.decompose()
    root = page.css_first("main") or (articles[0] if len(articles) == 1 else None) or page.body
    try:
        return tidy("".join(_pieces(root))) if root is not None else ""
    except RecursionError as error:
        raise DataError("cannot be read as HTML: elements are nested too deeply") from error


def _within(node: LexborNode, tags: Sequence[str]) -> bool:
    above = node.parent
    while above is not None and above.tag not in tags:
        above = above.parent
    return above is not None


def _pieces(node: LexborNode, verbatim: bool = False) -> Iterator[str]:
    for child in node.iter(include_text=True):
        tag = str(child.tag)
        if tag == "-text":
            text = child.text(deep=False) or ""
            if verbatim or text.strip() or node.tag not in _FRAMES:
                yield text if verbatim else re.sub(r"\s+", " ", text)
        elif tag == "br":
            yield "\n"
        elif tag in _CELLS:
            yield "".join(_pieces(child, verbatim)).strip() + "\t"
        elif tag in _BLOCKS:
            # Blocks of a list or table stand on lines of their own, others between blank lines.
            edge = "\n" if tag in ("li", "tr") else "\n\n"
            mark = "- " if tag == "li" else ""
            yield edge + mark + "".join(_pieces(child, verbatim or tag == "pre")).strip(" \n" if tag != "pre" else "\n")
            yield "" if edge == "\n" else edge
        elif tag not in _DROPPED and not tag.startswith(("-", "_")):
            yield from _pieces(child, verbatim)


def latex_text(source: str) -> str:
    """Return the text of LaTeX: headings, paragraphs, captions and formulas; citations, references, tables and code out.

    Macros that the source defines itself are not expanded.

    Raises:
        DataError: the library cannot read this source.
    """
    try:
        from pylatexenc.latex2text import LatexNodes2Text
        from pylatexenc.latexwalker import LatexWalker, LatexWalkerError
    except ImportError as error:
        raise _missing("LaTeX", "pylatexenc") from error

    body = re.search(r"\\begin\{document\}(.*?)(?:\\end\{document\}|\Z)", source, re.DOTALL)
    syntax, rules = _latex_rules()
    walker = LatexWalker(body[1] if body else source, latex_context=syntax, tolerant_parsing=True)
    try:
        nodes, _, _ = walker.get_latex_nodes()
        text = LatexNodes2Text(rules, math_mode="verbatim", strict_latex_spaces="macros").nodelist_to_text(nodes)
    except (LatexWalkerError, IndexError, RecursionError) as error:  # IndexError: pylatexenc 2.11 on missing arguments
        raise DataError(f"cannot be read as LaTeX: {error}") from error
    # What is left of a citation or a cross-reference: "see ~", "( )" and a space before a full stop.
    text = re.sub(r"\(\s*[;,]?\s*\)", "", text.replace("~", " ").replace("\xa0", " "))
    return tidy(re.sub(r"[ \t]+([.,;:])", r"\1", re.sub(r"[ \t]{2,}", " ", text)))


def _latex_rules() -> tuple[Any, Any]:
    """Return what macros take, and what they become, where it differs from the library's own rules."""
    from pylatexenc import latex2text, latexwalker, macrospec

    def last(node: Any, l2tobj: Any) -> str:
        return str(l2tobj.nodelist_to_text([node.nodeargd.argnlist[-1]]))

    def own_paragraph(node: Any, l2tobj: Any) -> str:
        return f"\n\n{last(node, l2tobj)}\n\n"

    syntax, rules = latexwalker.get_default_latex_context_db(), latex2text.get_default_latex_context_db()
    syntax.add_context_category(
        "smolmlx",
        prepend=True,
        macros=[macrospec.std_macro(name, arguments) for name, arguments in (_PARAGRAPHS | _INLINE | _SILENT).items()],
    )
    rules.add_context_category(
        "smolmlx",
        prepend=True,
        macros=[
            *(latex2text.MacroTextSpec(name, own_paragraph) for name in _PARAGRAPHS),
            *(latex2text.MacroTextSpec(name, last) for name in _INLINE),
            *(latex2text.MacroTextSpec(name, discard=True) for name in _SILENT),
        ],
        environments=[latex2text.EnvironmentTextSpec(name, discard=True) for name in _NO_TEXT],
    )
    return syntax, rules


def pdf_text(data: bytes) -> str:
    """Return the text of a PDF: words that were divided at a line's end joined, running heads and page numbers out.

    Raises:
        DataError: not a PDF, one that needs a password, or one with a broken page.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise _missing("PDF", "pypdfium2") from error

    pages: list[str] = []
    try:
        with closing(pypdfium2.PdfDocument(data)) as document:
            for number in range(len(document)):
                with closing(document[number]) as page, closing(page.get_textpage()) as text:
                    pages.append(text.get_text_bounded().replace("\r\n", "\n"))
    except pypdfium2.PdfiumError as error:
        where = f", page {len(pages) + 1}" if pages else ""
        raise DataError(f"cannot be read as PDF{where}: {error}") from error
    return join_pages(pages)


def join_pages(pages: Sequence[str]) -> str:
    """Join the text of pages; see `pdf_text`."""
    # PDFium writes U+FFFE, or U+0002 in old files, where a hyphen divides a word.
    lines = [[line.strip() for line in re.sub("\\s*[\ufffe\x02]\\s*", "-\n", page).split("\n")] for page in pages]
    seen = Counter(line for page in lines for line in {*page[:2], *page[-2:]} if line)
    running = {line for line, count in seen.items() if count >= max(_MIN_RUNNING_PAGES, len(pages) // 2)}
    kept = []
    for page in lines:
        inner = page[1:-1] if len(page) > 2 else []
        edges = [line if not (line in running or _PAGE_NUMBER.fullmatch(line)) else "" for line in (page[0], page[-1])]
        kept.append("\n".join([edges[0], *(line for line in inner if line not in running), edges[1]]).strip("\n"))
    text = re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", "\n".join(kept))
    return tidy(re.sub("[\ufb00-\ufb06]", lambda match: unicodedata.normalize("NFKC", match[0]), text))


def _missing(what: str, package: str) -> DataError:
    return DataError(f"reading {what} needs {package}: pip install 'smolmlx[documents]'")


TO_TEXT: dict[str, Callable[[str], str]] = {
    ".txt": tidy,
    ".md": markdown_text,
    ".markdown": markdown_text,
    ".html": html_text,
    ".htm": html_text,
    ".xhtml": html_text,
    ".tex": latex_text,
}
"""Suffix -> how the text of a file becomes running text."""


def suffix_of(path: Path) -> str:
    """Return the suffix that says what a file is, `.gz` behind `.jsonl` included."""
    name = path.name.lower()
    return ".jsonl.gz" if name.endswith(".jsonl.gz") else Path(name).suffix
