"""The report of a run as one HTML file that needs no network: figures in SVG, tables, light and dark, also in print."""

from llmprune.page.comparison import write_comparison
from llmprune.page.run import write_page

__all__ = ["write_comparison", "write_page"]
