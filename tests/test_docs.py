"""The Python blocks of the documentation run, in order, and print what stands below them.

The blocks of one file share a namespace. A block fenced as ``output`` holds what the Python block before it
prints. ``<!-- not run: REASON -->`` on the line above a fence leaves a block out, with its reason.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```\s*?$", re.MULTILINE | re.DOTALL
)
LEFT_OUT = re.compile(r"<!-- not run: .+ -->\s*\Z")


def blocks(text):
    """(line, language, code) of each fenced block that is to be run or compared."""
    for match in FENCE.finditer(text):
        if match["language"] in ("python", "output") and not LEFT_OUT.search(text[: match.start()]):
            yield text.count("\n", 0, match.start()) + 2, match["language"], match["code"]


def words(text):
    return " ".join(text.split())


def run(text, name, read_printed):
    namespace = {"__name__": "documentation"}
    printed = ""
    for line, language, code in blocks(text):
        if language == "python":
            read_printed()
            # as many empty lines before it, so that a traceback shows the page's line numbers
            exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)
            printed = read_printed()
        else:
            assert words(code) in words(printed), f"{name}:{line}: printed was\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_blocks_run(page, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    run(page.read_text(), str(page.relative_to(ROOT)), lambda: capsys.readouterr().out)


def test_the_pages_that_promise_code_have_some():
    code = {page.stem: [line for line, language, _ in blocks(page.read_text())] for page in PAGES}
    promising = "README index choose lottery-tickets recipes how-it-works flops speed write-a-method"
    for page in promising.split():
        assert code[page], page


def test_a_block_that_fails_or_prints_something_else_is_noticed(capsys):
    def printed():
        return capsys.readouterr().out

    run("```python\nprint('a  b')\n```\n\n```output\na b\n```\n", "page", printed)
    with pytest.raises(AssertionError, match="page:6"):
        run("```python\nprint('a')\n```\n\n```output\nc\n```\n", "page", printed)
    with pytest.raises(NameError):
        run("```python\nx = 1\n```\n```python\ny\n```\n", "page", printed)
    run("<!-- not run: needs a GPU -->\n```python\ny\n```\n", "page", printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]
