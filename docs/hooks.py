"""What MkDocs asks of us while it builds: the generated pages and pictures, and their places in the navigation."""

from __future__ import annotations

from typing import Any

from generate import api, command_line, figures, layers, patches, runner, stages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PICTURES = {"layers": layers.draw, "stages": stages.draw, "runner": runner.draw, **figures.FIGURES}


def generated() -> dict[str, str]:
    """Every file that is made and not checked in, by its path in the site's source."""
    pages = {"patches/index.md": patches.index_page(), "reference/command_line.md": command_line.page()}
    pages |= {f"patches/{patch.name}.md": patches.page(patch) for patch in patches.all_patches()}
    pages |= {f"reference/{page.name}.md": api.page(page) for page in api.PAGES}
    pages |= {f"pictures/{name}.svg": draw() for name, draw in PICTURES.items()}
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills the two places in mkdocs.yml whose pages are known only now."""
    records = [{patch.name: f"patches/{patch.name}.md"} for patch in patches.all_patches()]
    reference: list[Any] = [{page.title: f"reference/{page.name}.md"} for page in api.PAGES]
    for section in config.nav or ():
        if section.get("Patches") == []:
            section["Patches"] = [{"All": "patches/index.md"}, *records]
        if "Reference" in section:
            section["Reference"] = [*reference, *section["Reference"]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and pictures."""
    for path, content in generated().items():
        files.append(File.generated(config, path, content=content))
    return files
