"""Hooks of mkdocs that add the page and the figure of benchmarks/ to the site."""

from pathlib import Path

from mkdocs.structure.files import File

PATHS = ("benchmarks/README.md", "benchmarks/results/paper/cpu.png")


def on_files(files, config):
    """Add the files in `PATHS`, which are outside docs/."""
    root = Path(config.docs_dir).parent
    for path in PATHS:
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown, **_):
    """Rewrite links to benchmarks/ for the site."""
    return markdown.replace("](../benchmarks/", "](benchmarks/")
