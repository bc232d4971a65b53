"""Hooks of mkdocs: the page and the figure of benchmarks/ are also on the site."""

from pathlib import Path

from mkdocs.structure.files import File

PATHS = ("benchmarks/README.md", "benchmarks/results/paper/cpu.png")


def on_files(files, config):
    """Add files from outside docs/."""
    root = Path(config.docs_dir).parent
    for path in PATHS:
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown, **_):
    """Point links to these files at their place on the site."""
    return markdown.replace("](../benchmarks/", "](benchmarks/")
