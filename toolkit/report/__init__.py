"""What a person sees of a run: tables on the terminal, and its page."""

from toolkit.report import machine, terminal
from toolkit.report.page import render_page, write_page
from toolkit.report.serve import page_server

__all__ = ["machine", "page_server", "render_page", "terminal", "write_page"]
